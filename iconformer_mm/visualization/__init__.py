from .comparison import CurvePanel, TradeoffPanel, plot_comparison, plot_curves, plot_tradeoff
from .predictions import PredictionRow, draw_classes, draw_instances, plot_predictions

__all__ = [
    'CurvePanel',
    'PredictionRow',
    'TradeoffPanel',
    'draw_classes',
    'draw_instances',
    'plot_comparison',
    'plot_curves',
    'plot_predictions',
    'plot_tradeoff',
]
