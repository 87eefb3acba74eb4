"""Plots that compare PEFT methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout='constrained')
    FigureCanvasAgg(figure)
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
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
