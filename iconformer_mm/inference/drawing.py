"""One prediction, drawn as its library draws it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.structures import BaseDataElement

from iconformer_mm.figures import new_figure, save_figure

SCORE_THRESHOLD = 0.3
SHORT_SIDE = 400  # pixels, at least, of a picture with boxes


def draw_prediction(
    image: np.ndarray,
    prediction: BaseDataElement,
    path: str | os.PathLike,
    meta: Mapping[str, Any] | None = None,
    score_threshold: float = SCORE_THRESHOLD,
) -> None:
    """Draw what a model says of an image, by the visualizer of its library.

    Labels with their scores, boxes and masks, maps of classes over the image, or a depth map
    beside the image with a bar in metres. Images with a short side below 400 pixels are enlarged for boxes.

    Args:
        image: (H, W, 3), uint8, RGB.
        prediction: Data sample of MMPretrain, MMDetection or MMSegmentation.
        path: Image file to write; its folder is made.
        meta: ``classes`` and ``palette``, where they are known.
        score_threshold: Instances of a smaller score are not drawn. Defaults to 0.3.

    Raises:
        ValueError: The data sample holds no prediction that is known.
    """
    meta = dict(meta or {})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    options = dict(image=image, data_sample=prediction, draw_gt=False, out_file=str(path))
    if 'pred_depth_map' in prediction:
        _draw_depth(image, prediction.pred_depth_map.data.squeeze().cpu().numpy(), path)
    elif 'pred_sem_seg' in prediction:
        from mmseg.visualization import SegLocalVisualizer

        visualizer = SegLocalVisualizer(alpha=0.5)
        visualizer.set_dataset_meta(**meta)
        visualizer.add_datasample('prediction', **options)
    elif 'pred_instances' in prediction:
        from mmdet.visualization import DetLocalVisualizer

        visualizer = DetLocalVisualizer()
        visualizer.dataset_meta = {'palette': 'random', **meta}
        options['image'], options['data_sample'] = _enlarge(image, prediction)
        visualizer.add_datasample('prediction', **options, pred_score_thr=score_threshold)
    elif 'pred_score' in prediction:
        from mmpretrain.visualization import UniversalVisualizer

        visualizer = UniversalVisualizer()
        short = min(image.shape[:2])
        # A label needs some room.
        visualizer.visualize_cls(**options, classes=meta.get('classes'), resize=224 if short < 224 else None)
    else:
        raise ValueError(f'there is no prediction to draw in {type(prediction).__name__}: {list(prediction.keys())}')


def _enlarge(image: np.ndarray, prediction: BaseDataElement) -> tuple[np.ndarray, BaseDataElement]:
    """A small image and its instances several times as large, since text and lines are of a fixed size."""
    factor = math.ceil(SHORT_SIDE / min(image.shape[:2]))
    if factor == 1:
        return image, prediction
    prediction = prediction.clone()
    instances = prediction.pred_instances = prediction.pred_instances.clone()  # the first copy shares it
    instances.bboxes = instances.bboxes * factor
    if 'masks' in instances:
        instances.masks = instances.masks.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    return cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC), prediction


def _draw_depth(image: np.ndarray, depth: np.ndarray, path: str | os.PathLike) -> None:
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
