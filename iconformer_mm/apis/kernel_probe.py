"""Deprecated: the old place of :mod:`iconformer_mm.analysis.kernel_probe`."""

from iconformer_mm.deprecation import moved

__getattr__ = moved(__name__, {}, rest='iconformer_mm.analysis.kernel_probe')
