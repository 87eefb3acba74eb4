"""Deprecated: the old place of :mod:`iconformer_mm.analysis.saliency`."""

from iconformer_mm.deprecation import moved

__getattr__ = moved(__name__, {}, rest='iconformer_mm.analysis.saliency')
