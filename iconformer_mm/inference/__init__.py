"""Prediction, and drawing what was predicted."""

from .drawing import draw_prediction
from .inferencer import AdapterInferencer

__all__ = ['AdapterInferencer', 'draw_prediction']
