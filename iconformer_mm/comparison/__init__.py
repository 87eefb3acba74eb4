"""Comparisons of PEFT methods: what a YAML file asks for, its runs, and tables and plots of their results."""

from .plots import CurvePanel, TradeoffPanel, plot_comparison, plot_curves, plot_tradeoff
from .prediction_plots import PredictionRow, plot_predictions

__all__ = [
    'CurvePanel',
    'PredictionRow',
    'TradeoffPanel',
    'plot_comparison',
    'plot_curves',
    'plot_predictions',
    'plot_tradeoff',
]
