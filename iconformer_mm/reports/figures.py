"""Plots of the history of a training run."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from iconformer_mm.figures import new_figure

DOTTED = 60  # curves with at most this many values get markers, so that a single value is visible
LEGEND_COLUMNS = 3


@dataclass(frozen=True)
class HistoryPanel:
    """Quantities of a run over its steps.

    Attributes:
        title: Title.
        xlabel: What a step is.
        curves: Pairs of a step and a value, by curve name. Values that are not finite leave a gap.
    """

    title: str
    xlabel: str
    curves: Mapping[str, Sequence[tuple[float, float]]]


def draw_history(panel: HistoryPanel, logarithmic: bool = False) -> str:
    """Draw a panel.

    Args:
        panel: The panel.
        logarithmic: Whether to use a logarithmic value axis if all values are positive.
            Defaults to False.

    Returns:
        An SVG picture. The same panel always gives the same text.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    legend_rows = -(-len(panel.curves) // LEGEND_COLUMNS) if len(panel.curves) > 1 else 0
    figure = new_figure(4.6, 3.0 + 0.16 * legend_rows)
    axes = figure.subplots()
    values = [y for curve in panel.curves.values() for _, y in curve if math.isfinite(y)]
    for index, (name, curve) in enumerate(panel.curves.items()):
        steps, heights = zip(*((x, y if math.isfinite(y) else math.nan) for x, y in curve))
        marker = 'o' if len(curve) <= DOTTED else None
        axes.plot(steps, heights, label=name, color=f'C{index % 10}', marker=marker, markersize=3, linewidth=1.4)
    if logarithmic and values and min(values) > 0:
        axes.set_yscale('log')
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend_rows:  # outside, because curves may be anywhere inside
        figure.legend(loc='outside lower center', ncols=LEGEND_COLUMNS, fontsize=8, frameon=False)
    axes.set(title=panel.title, xlabel=panel.xlabel)
    axes.grid(alpha=0.3)
    text = io.StringIO()
    with matplotlib.rc_context({'svg.hashsalt': panel.title}):
        figure.savefig(text, format='svg', metadata={'Date': None, 'Creator': None})
    return text.getvalue()
