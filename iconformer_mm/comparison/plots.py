"""Plots that compare PEFT methods."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iconformer_mm.figures import REFERENCE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = 'os^DvP*X<>hpd'


@dataclass
class TradeoffPanel:
    """Scores on one task against trained parameters.

    Attributes:
        title: Title of the score.
        points: Of each method, by its name: trained parameters, mean score, standard deviation.
        where: Where the trained parameters are. Defaults to the backbone.
    """

    title: str
    points: Mapping[str, tuple[int, float, float]]
    where: str = 'backbone'


@dataclass
class CurvePanel:
    """Training on one task.

    Attributes:
        title: Title.
        curves: Of each method, by its name: pairs of a step and a loss.
    """

    title: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


def plot_comparison(
    names: Sequence[str],
    trained: Sequence[int],
    means: Sequence[float],
    stds: Sequence[float],
    path: str | os.PathLike,
    ylabel: str = 'accuracy (%)',
    title: str | None = None,
) -> None:
    """Plot a score against the number of trained parameters, one point a method.

    Args:
        names: Names of the methods.
        trained: Trained parameters of each, on a logarithmic axis.
        means: Mean score of each.
        stds: Standard deviation of each, drawn as a bar.
        path: Image file to write.
        ylabel: Label of the score.
        title: Title, if any.
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for index, (name, x, y, spread) in enumerate(zip(names, trained, means, stds)):
        axes.errorbar(x, y, yerr=spread, fmt='o', markersize=8, capsize=4, color=f'C{index}')
        # Away from the point towards the middle, so that no label is cut off.
        left = x > (min(trained) * max(trained)) ** 0.5
        axes.annotate(
            name,
            (x, y),
            xytext=(-9 if left else 9, 6),
            textcoords='offset points',
            ha='right' if left else 'left',
            color=f'C{index}',
        )
    axes.set_xscale('log')
    axes.margins(0.15)
    axes.set_xlabel('trained parameters')
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    if title:
        axes.set_title(title)
    save_figure(figure, path)


def plot_tradeoff(
    panels: Sequence[TradeoffPanel], names: Sequence[str], path: str | os.PathLike, reference: str | None = None
) -> None:
    """Plot scores against trained parameters, a panel a task, with one legend.

    Args:
        panels: The panels.
        names: All methods; a method looks the same in every plot of the same names.
        path: Image file to write.
        reference: The method drawn as a dashed horizontal line, such as full fine-tuning.
    """
    figure, grid = _panels(len(panels))
    for axes, panel in zip(grid, panels):
        for index, name in enumerate(names):
            if name not in panel.points:
                continue
            trained, mean, std = panel.points[name]
            if name == reference:
                axes.axhline(mean, label=name, **REFERENCE)
                axes.axhspan(mean - std, mean + std, color='black', alpha=0.06)
            else:
                look: dict[str, Any] = dict(fmt=MARKERS[index % len(MARKERS)], color=f'C{index % 10}', alpha=0.9)
                axes.errorbar(trained, mean, yerr=std, label=name, markersize=7, capsize=3, **look)
        _scale_parameters(axes, [x for name, (x, _, _) in panel.points.items() if name != reference])
        axes.margins(0.1)
        axes.set(title=panel.title, xlabel=f'trained parameters of the {panel.where}')
        axes.grid(alpha=0.3)
    _shared_legend(figure, grid, names)
    save_figure(figure, path)


def plot_curves(
    panels: Sequence[CurvePanel], names: Sequence[str], path: str | os.PathLike, reference: str | None = None
) -> None:
    """Plot smoothed losses over the training steps, a panel a task, with one legend.

    Args:
        panels: The panels.
        names: All methods; a method looks the same in every plot of the same names.
        path: Image file to write.
        reference: The method drawn dashed and black.
    """
    figure, grid = _panels(len(panels))
    for axes, panel in zip(grid, panels):
        for index, name in enumerate(names):
            if panel.curves.get(name):
                steps, losses = zip(*panel.curves[name])
                look: dict[str, Any] = dict(color=f'C{index % 10}', linestyle='-' if index < 10 else ':', linewidth=1.4)
                axes.plot(steps, smooth(losses), label=name, **(REFERENCE if name == reference else look))
        if all(loss > 0 for curve in panel.curves.values() for _, loss in curve):
            axes.set_yscale('log')
        axes.set(title=panel.title, xlabel='step')
        axes.grid(alpha=0.3)
    _shared_legend(figure, grid, names)
    save_figure(figure, path)


def smooth(values: Sequence[float], reach: int = 2) -> list[float]:
    """Means over each value and its neighbours, as far as there are.

    Args:
        values: The values.
        reach: Neighbours on each side.

    Returns:
        As many values.
    """
    windows = [values[max(0, index - reach) : index + reach + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, in two rows if they are more than three."""
    columns = count if count <= 3 else math.ceil(count / 2)
    rows = math.ceil(count / columns)
    figure = new_figure(4.6 * columns, 3.4 * rows + 1.2)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, grid[:count]


def _scale_parameters(axes: Axes, trained: Sequence[int]) -> None:
    """A logarithmic axis, with a place on its left for methods that train nothing of the backbone."""
    positive = [x for x in trained if x > 0]
    if not positive:
        return
    if len(positive) == len(trained):
        axes.set_xscale('log')
        return
    first = math.floor(math.log10(min(positive)))
    axes.set_xscale('symlog', linthresh=10**first, linscale=0.3)
    axes.set_xticks([0, *(10**power for power in range(first, math.ceil(math.log10(max(positive))) + 1))])
    axes.axvspan(-0.3 * 10**first, 0.3 * 10**first, color='black', alpha=0.05)


def _shared_legend(figure: Figure, grid: Sequence[Axes], names: Sequence[str]) -> None:
    """One legend below all panels, in the order of the names."""
    handles = {}
    for axes in grid:
        handles.update({label: handle for handle, label in zip(*axes.get_legend_handles_labels())})
    found = [name for name in names if name in handles]
    if found:
        look: dict[str, Any] = dict(loc='outside lower center', ncols=min(len(found), 4, 2 * len(grid)), frameon=False)
        figure.legend([handles[name] for name in found], found, **look)
