"""Plots of what iCoN does with images: kernels, their differences, filtered maps, and saliency."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from iconformer_mm.figures import new_figure, save_figure

THUMBNAILS = 60  # more would overlap
PIXELS = 80  # montage pixels per inch


@dataclass
class FilteredMaps:
    """The bottleneck of one adapter for one image.

    Attributes:
        title: Label.
        before: Before the filter, (H, W, c).
        after: After the filter, (H, W, c).
    """

    title: str
    before: np.ndarray
    after: np.ndarray


@dataclass
class SaliencyRow:
    """Where models look in one image.

    Attributes:
        title: Label.
        image: (H, W, 3), uint8, RGB.
        maps: Maps (h, w) from 0 to 1, resized to the image. None leaves a blank.
    """

    title: str
    image: np.ndarray
    maps: Sequence[np.ndarray | None]


def spread_out(count: int, number: int) -> list[int]:
    """Return ``number`` evenly spaced indices below ``count``, or all of them if there are fewer."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(number, count))})


def plot_kernels(
    kernels: np.ndarray,
    images: Sequence[np.ndarray],
    titles: Sequence[str],
    path: str | os.PathLike,
    title: str,
    channels: int = 8,
) -> None:
    """Plot the kernels of an adapter, one row per image and one column per channel.

    The last row shows their standard deviation between images.

    Args:
        kernels: (N, c, K, K).
        images: N images (H, W, 3), uint8, RGB.
        titles: Labels of the images.
        path: Image file to write.
        title: Title.
        channels: Maximum number of channels to draw, evenly spaced. Defaults to 8.
    """
    shown = spread_out(kernels.shape[1], channels)
    limit = float(np.abs(kernels[:, shown]).max()) or 1.0
    spreads = kernels.std(axis=0)[shown]
    cells = [[image, *_coloured(made[shown], 'RdBu_r', -limit, limit)] for image, made in zip(images, kernels)]
    cells.append([None, *_coloured(spreads, 'Greys', 0, float(spreads.max()) or 1.0)])
    names = [*titles, f'std between images\n(black: {spreads.max():.2g})']
    columns = ['image', *(f'channel {channel}' for channel in shown)]
    _plot_montage(cells, (60, 60), names, columns, path, title, bar=('RdBu_r', -limit, limit, 'kernel'))


def plot_distances(distances: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Plot matrices of distances between images, one panel each, on one colour scale.

    Args:
        distances: Matrices (N, N) by title, in units of the kernels' mean norm. Images are numbered from 1.
        path: Image file to write.
    """
    columns = min(len(distances), 4)
    rows = math.ceil(len(distances) / columns)
    figure = new_figure(2.3 * columns + 0.9, 2.35 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False)
    limit = max(float(matrix.max()) for matrix in distances.values()) or 1.0
    for axes in list(grid.flat)[len(distances) :]:
        axes.set_axis_off()
    for axes, (title, matrix) in zip(grid.flat, distances.items()):
        drawn = axes.imshow(matrix, cmap='viridis', vmin=0, vmax=limit)
        axes.set_title(title, fontsize=8)
        ticks = spread_out(len(matrix), 8)
        axes.set_xticks(ticks, [str(i + 1) for i in ticks], fontsize=6)
        axes.set_yticks(ticks, [str(i + 1) for i in ticks], fontsize=6)
    figure.colorbar(drawn, ax=grid, shrink=0.8, fraction=0.03, label="distance / kernels' mean norm")
    save_figure(figure, path)


def plot_components(
    points: np.ndarray, explained: Sequence[float], images: Sequence[np.ndarray], path: str | os.PathLike, title: str
) -> None:
    """Plot images at their first two principal components, with thumbnails for up to 60 images.

    Args:
        points: (N, 2).
        explained: Shares of the variance that the two components explain.
        images: N images (H, W, 3), uint8, RGB.
        path: Image file to write.
        title: Title.
    """
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    figure = new_figure(7, 5.6)
    axes = figure.subplots()
    axes.scatter(points[:, 0], points[:, 1], s=12)
    if len(images) <= THUMBNAILS:
        for point, image in zip(points, images):
            thumbnail = OffsetImage(image, zoom=(44 if len(images) <= 24 else 30) / max(image.shape[:2]))
            box = dict(edgecolor='0.5', linewidth=0.6)
            axes.add_artist(AnnotationBbox(thumbnail, point, pad=0.08, bboxprops=box))
    axes.margins(0.14)
    axes.set(
        title=title,
        xlabel=f'first component ({explained[0]:.0%} of the variance)',
        ylabel=f'second component ({explained[1]:.0%})',
    )
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_shares(shares: Mapping[str, float], path: str | os.PathLike) -> None:
    """Plot a share of variance for each layer.

    Args:
        shares: From 0 to 1, by layer.
        path: Image file to write.
    """
    figure = new_figure(6.4, 0.28 * len(shares) + 1.1)
    axes = figure.subplots()
    bars = axes.barh(list(shares), [100 * share for share in shares.values()], color='C0')
    axes.bar_label(bars, fmt='%.1f', padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, 115 * max(shares.values())))
    axes.set_xlabel("share of the kernels' variance between images (%)")
    axes.grid(alpha=0.3, axis='x')
    save_figure(figure, path)


def plot_filtered_maps(
    rows: Sequence[FilteredMaps], image: np.ndarray, path: str | os.PathLike, channels: int = 4
) -> None:
    """Plot some channels of bottlenecks before and after the filter, one row per adapter.

    Each map has its own colour range.

    Args:
        rows: The rows.
        image: (H, W, 3), uint8, RGB.
        path: Image file to write.
        channels: Maximum number of channels to draw, evenly spaced. Defaults to 4.
    """
    shown = spread_out(rows[0].before.shape[2], channels)
    cells: list[list[np.ndarray | None]] = [[image] + [None] * (2 * len(shown) - 1)]
    for row in rows:
        pairs = [(row.before[..., c], row.after[..., c]) for c in shown]
        maps = [each for pair in pairs for each in pair]
        cells.append([_coloured(each, 'viridis', float(each.min()), float(each.max())) for each in maps])
    columns = [label for c in shown for label in (f'channel {c},\nbefore', f'channel {c},\nafter')]
    _plot_montage(cells, _tile_of(image), ['image', *(row.title for row in rows)], columns, path)


def plot_saliency(rows: Sequence[SaliencyRow], columns: Sequence[str], path: str | os.PathLike) -> None:
    """Plot saliency maps over images, one row per image.

    Args:
        rows: The rows.
        columns: Titles of the maps.
        path: Image file to write.
    """
    size = _tile_of(rows[0].image)
    cells = [[row.image, *(_overlay(row.image, values, size) for values in row.maps)] for row in rows]
    _plot_montage(cells, size, [row.title for row in rows], ['image', *columns], path)


def _coloured(values: np.ndarray, cmap: str, low: float, high: float) -> np.ndarray:
    """Map values (...) to colours (..., 3), uint8."""
    from matplotlib import colormaps

    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return colormaps[cmap](scaled, bytes=True)[..., :3]


def _tile_of(image: np.ndarray, side: int = 120) -> tuple[int, int]:
    """Return the height and width of tiles with an image's aspect ratio."""
    height, width = image.shape[:2]
    return round(side * height / max(height, width)), round(side * width / max(height, width))


def _fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, 3) to the largest size (h, w) that fits into a tile."""
    factor = min(size[0] / image.shape[0], size[1] / image.shape[1])
    width, height = max(1, round(factor * image.shape[1])), max(1, round(factor * image.shape[0]))
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST if factor > 1 else cv2.INTER_AREA)


def _overlay(image: np.ndarray, values: np.ndarray | None, size: tuple[int, int]) -> np.ndarray | None:
    """Draw a map from 0 to 1 over a grey version of an image."""
    if values is None:
        return None
    grey = _fitted(image, size).mean(axis=2, keepdims=True)
    stretched = cv2.resize(values, grey.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    return (0.4 * grey + 0.6 * _coloured(stretched, 'inferno', 0, 1)).astype(np.uint8)


def _plot_montage(
    cells: Sequence[Sequence[np.ndarray | None]],
    size: tuple[int, int],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | os.PathLike,
    title: str | None = None,
    bar: tuple[str, float, float, str] | None = None,
) -> None:
    """Plot tiles in rows and columns as one picture. This is much faster than separate axes.

    Args:
        cells: Images (h, w, 3), uint8, of any size. None leaves a blank.
        size: Height and width of the tiles in pixels.
        rows: Labels of the rows.
        columns: Labels of the columns.
        path: Image file to write.
        title: Title, if any.
        bar: Colour map, smallest and largest value, and label of a colour bar, if any.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    gap = 6
    down, across = size[0] + gap, size[1] + gap
    canvas = np.full((down * len(cells) - gap, across * len(columns) - gap, 3), 255, np.uint8)
    for i, line in enumerate(cells):
        for j, cell in enumerate(line):
            if cell is not None:
                tile = _fitted(cell, size)
                y, x = i * down + (size[0] - len(tile)) // 2, j * across + (size[1] - tile.shape[1]) // 2
                canvas[y : y + len(tile), x : x + tile.shape[1]] = tile
    # Place the parts by hand: constrained layouts ignore the labels of axes with a fixed aspect.
    left = 0.2 + 0.068 * max(len(line) for label in rows for line in label.split('\n'))
    right, below, above = 1.0 if bar else 0.2, 0.15, 0.7 if title else 0.5
    wide, high = canvas.shape[1] / PIXELS, canvas.shape[0] / PIXELS
    width, height = left + wide + right, below + high + above
    figure = new_figure(width, height)
    figure.set_layout_engine('none')
    axes = figure.add_axes((left / width, below / height, wide / width, high / height))
    axes.imshow(canvas, interpolation='nearest')
    axes.set_yticks([i * down + size[0] / 2 for i in range(len(rows))], rows, fontsize=8)
    axes.set_xticks([j * across + size[1] / 2 for j in range(len(columns))], columns, fontsize=8)
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, fontsize=10)
    if bar is not None:
        cmap, low, most, label = bar
        place = figure.add_axes(
            ((left + wide + 0.15) / width, (below + 0.2 * high) / height, 0.13 / width, 0.6 * high / height)
        )
        figure.colorbar(ScalarMappable(Normalize(low, most), cmap), cax=place, label=label)
    save_figure(figure, path, dpi=100)
