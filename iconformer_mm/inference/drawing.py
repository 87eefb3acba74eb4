"""Pictures of predictions that the libraries' visualizers do not make."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import cv2
import numpy as np
from mmengine.structures import BaseDataElement

from iconformer_mm.figures import new_figure, save_figure

SHORT_SIDE = 400  # pixels, at least, of a picture with boxes


def enlarge(image: np.ndarray, prediction: BaseDataElement) -> tuple[np.ndarray, BaseDataElement]:
    """A small image and its instances several times as large, since text and lines are of a fixed size."""
    factor = math.ceil(SHORT_SIDE / min(image.shape[:2]))
    if factor == 1:
        return image, prediction
    prediction = prediction.clone()
    instances = prediction.pred_instances = prediction.pred_instances.clone()  # the copy above shares them
    instances.bboxes = instances.bboxes * factor
    if 'masks' in instances:
        instances.masks = instances.masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC), prediction


def draw_depth(image: np.ndarray, depth: np.ndarray, path: str | os.PathLike) -> None:
    """The image and its depth map (H, W) in metres."""
    height, width = depth.shape
    figure = new_figure(8.6, 4 * height / width + 0.4)
    left, right = figure.subplots(1, 2)
    left.imshow(image)
    drawn = right.imshow(depth, cmap='viridis_r')
    figure.colorbar(drawn, ax=right, label='depth (m)', fraction=0.046 * height / width, pad=0.02)
    for axes in (left, right):
        axes.set(xticks=[], yticks=[])
    save_figure(figure, path, dpi=120)


def draw_classes(labels: np.ndarray, palette: Sequence[Sequence[int]]) -> np.ndarray:
    """Colour a map of class indices.

    Args:
        labels: (H, W), integers; those without a colour (such as 255, ignored) are black.
        palette: RGB of each class.

    Returns:
        (H, W, 3), uint8.
    """
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(palette)] = palette
    return colours[np.asarray(labels).astype(np.uint8)]


def draw_instances(
    image: np.ndarray, masks: np.ndarray, labels: Sequence[int], palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """Draw instance masks over an image, each in its class's colour with an outline.

    Args:
        image: (H, W, 3), uint8, RGB.
        masks: (N, H, W), bool.
        labels: N class indices.
        palette: RGB of each class.

    Returns:
        (H, W, 3), uint8.
    """
    drawn = np.ascontiguousarray(image // 3 + 40)
    for mask, label in zip(masks, labels):
        colour = np.array(palette[label])
        drawn[mask] = (drawn[mask] * 0.35 + colour * 0.65).astype(np.uint8)
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, outlines, -1, [int(c) for c in np.minimum(colour + 60, 255)], 1)
    return drawn


def draw_boxes(
    image: np.ndarray, boxes: Sequence[Sequence[float]], labels: Sequence[int], palette: Sequence[Sequence[int]]
) -> np.ndarray:
    """Draw the outlines of boxes over an image, each in its class's colour.

    Args:
        image: (H, W, 3), uint8, RGB.
        boxes: N boxes, as x and y of two corners, in pixels.
        labels: N class indices.
        palette: RGB of each class.

    Returns:
        (H, W, 3), uint8.
    """
    drawn = np.ascontiguousarray(image // 3 + 40)
    for box, label in zip(boxes, labels):
        left, top, right, bottom = (round(value) for value in box)
        cv2.rectangle(drawn, (left, top), (right, bottom), [int(c) for c in palette[label]], 1)
    return drawn
