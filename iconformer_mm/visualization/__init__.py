"""Deprecated: the old place of the plots in ``comparison``."""

from iconformer_mm.deprecation import moved

__getattr__ = moved(
    __name__,
    {
        'iconformer_mm.comparison.plots': [
            'CurvePanel',
            'TradeoffPanel',
            'plot_comparison',
            'plot_curves',
            'plot_tradeoff',
        ],
        'iconformer_mm.comparison.prediction_plots': [
            'PredictionRow',
            'plot_predictions',
        ],
        'iconformer_mm.inference.drawing': ['draw_classes', 'draw_instances'],
    },
)
