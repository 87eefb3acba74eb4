"""Predictions of several models beside the ground truth."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iconformer_mm.figures import new_figure, save_figure


@dataclass
class PredictionRow:
    """One image and what was predicted for it.

    Attributes:
        title: Label of the row.
        image: (H, W, 3), uint8, RGB.
        maps: The ground truth and the predictions: RGB images (H, W, 3), or
            depth maps (H, W) in metres, drawn in colours with a bar.
    """

    title: str
    image: np.ndarray
    maps: Sequence[np.ndarray]


def plot_predictions(rows: Sequence[PredictionRow], columns: Sequence[str], path: str | os.PathLike) -> None:
    """Plot images with their ground truth and predictions, a row each.

    Args:
        rows: The rows. Depth maps of one row share their colours, from zero to
            the largest true depth.
        columns: Titles of the columns after the image's, the ground truth's first.
        path: Image file to write.
    """
    height, width = rows[0].image.shape[:2]
    cells = len(columns) + 1
    figure = new_figure(1.9 * cells + 0.6, 1.98 * len(rows) * height / width + 0.3)
    grid = figure.subplots(len(rows), cells + 1, squeeze=False, width_ratios=[1] * cells + [0.06])
    for row, axes in zip(rows, grid):
        axes[0].imshow(row.image)
        axes[0].set_ylabel(row.title)
        for cell, drawn in zip(axes[1:], row.maps):
            if drawn.ndim == 2:
                picture = cell.imshow(drawn, cmap='viridis_r', vmin=0, vmax=float(row.maps[0].max()))
            else:
                cell.imshow(drawn)
        for cell in axes[:cells]:
            cell.set(xticks=[], yticks=[])
        if row.maps[0].ndim == 2:
            figure.colorbar(picture, cax=axes[cells], label='metres')
        else:
            axes[cells].axis('off')
    for cell, title in zip(grid[0], ['image', *columns]):
        cell.set_title(title, fontsize=10)
    save_figure(figure, path, dpi=130)
