"""Prediction, and drawing of predictions."""

from .inferencer import AdapterInferencer
from .predictions import describe_prediction, draw_prediction

__all__ = ['AdapterInferencer', 'describe_prediction', 'draw_prediction']
