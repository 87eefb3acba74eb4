from .comparison import plot_comparison
from .predictions import PredictionRow, draw_classes, draw_instances, plot_predictions

__all__ = ['PredictionRow', 'draw_classes', 'draw_instances', 'plot_comparison', 'plot_predictions']
