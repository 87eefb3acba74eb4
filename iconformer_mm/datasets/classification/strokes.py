"""Drawn glyphs: a source task that is generated, not downloaded."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

_SPLITS = ('train', 'test')


def make_glyph(label: int, seed: int) -> list[np.ndarray]:
    """Make the strokes that define a class: 1 to 3 arrays of 3 to 5 control points in [0, 1]."""
    rng = np.random.default_rng([seed, label])
    return [rng.uniform(0.15, 0.85, size=(rng.integers(3, 6), 2)) for _ in range(rng.integers(1, 4))]


def _curve(points: np.ndarray, samples: int = 24) -> np.ndarray:
    """Evaluate the Bezier curve of the control points with De Casteljau's algorithm."""
    t = np.linspace(0, 1, samples)[:, None, None]
    layer = np.repeat(points[None], samples, axis=0)
    while layer.shape[1] > 1:
        layer = (1 - t) * layer[:, :-1] + t * layer[:, 1:]
    return layer[:, 0]


def draw_glyph(glyph: list[np.ndarray], rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a glyph like handwriting: shifted, rotated, slanted, thickened, blurred.

    Args:
        glyph: Control points of the strokes.
        rng: Source of the variation.
        size: Side of the image in pixels.

    Returns:
        Grey image, (size, size), uint8, bright on dark.
    """
    angle, shear = rng.uniform(-0.25, 0.25), rng.uniform(-0.25, 0.25)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotation @ np.array([[1, shear], [0, 1]]) * rng.uniform(0.75, 1.15, size=(1, 2))
    shift = 0.5 + rng.uniform(-0.07, 0.07, size=2)

    scale, fraction = 4 * size, 4  # 4 x supersampling, steps of 1/16 pixel
    canvas = np.zeros((scale, scale), np.uint8)
    thickness = int(rng.uniform(1.4, 4.5) * 4)
    for points in glyph:
        jittered = points + rng.normal(0, 0.035, size=points.shape)
        curve = _curve((jittered - 0.5) @ matrix.T + shift) * scale
        cv2.polylines(
            canvas,
            [np.round(curve * 2**fraction).astype(np.int32)],
            isClosed=False,
            color=255,
            thickness=thickness,
            lineType=cv2.LINE_AA,
            shift=fraction,
        )
    # A random resolution, from sharp strokes to scans of a few pixels.
    image = cv2.resize(canvas, (int(rng.integers(8, size + 1)),) * 2, interpolation=cv2.INTER_AREA)
    image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    image = image * rng.uniform(0.7, 1.2) + rng.normal(0, rng.uniform(0, 12), size=image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


@DATASETS.register_module()
class Strokes(BaseDataset):
    """Images of invented glyphs, drawn from a seed (ours).

    Each class is a glyph of one to three curved strokes. Each image is a new
    drawing of its glyph. The data set replaces a large source data set where none
    can be downloaded: a small Transformer learns to read strokes from it.

    Args:
        split: ``'train'`` or ``'test'``. They use separate random streams. Defaults to ``'train'``.
        num_images: Number of images. Defaults to 20000.
        num_classes: Number of glyphs. Defaults to 50.
        image_size: Side of an image in pixels. Defaults to 28.
        seed: Seed of glyphs and images. Defaults to 0.
        **kwargs: Arguments of ``mmpretrain.BaseDataset``.

    Raises:
        ValueError: ``split`` is unknown.
    """

    def __init__(
        self,
        split: str = 'train',
        num_images: int = 20000,
        num_classes: int = 50,
        image_size: int = 28,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f'split must be one of {", ".join(_SPLITS)}, got {split!r}')
        self.split = split
        self.num_images = num_images
        self.num_classes = num_classes
        self.image_size = image_size
        self.seed = seed
        super().__init__(ann_file='', metainfo=dict(classes=[f'glyph {i}' for i in range(num_classes)]), **kwargs)

    def load_data_list(self) -> list[dict]:
        """Draw all images."""
        glyphs = [make_glyph(label, self.seed) for label in range(self.num_classes)]
        rng = np.random.default_rng([self.seed, self.num_classes + _SPLITS.index(self.split)])
        labels = rng.permutation(np.arange(self.num_images) % self.num_classes)
        return [dict(img=draw_glyph(glyphs[k], rng, self.image_size), gt_label=int(k)) for k in labels]
