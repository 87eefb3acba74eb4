"""Figures of matplotlib without its global state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iconformer_mm.extras import require_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A line that curves or points are compared with.
REFERENCE: dict[str, Any] = dict(color='black', linestyle='--', linewidth=1.2)


def new_figure(width: float, height: float) -> Figure:
    """A figure of so many inches, whose parts make room for each other.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    require_extra('plot', 'drawing a figure')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 150) -> None:
    """Write a figure to an image file, whose folder is made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
