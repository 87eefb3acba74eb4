"""Deprecated: the old place of :mod:`iconformer_mm.analysis.inspection`."""

from iconformer_mm.deprecation import moved

__getattr__ = moved(
    __name__,
    {'iconformer_mm.engine.config': ['build_model', 'method_of', 'names_weights']},
    rest='iconformer_mm.analysis.inspection',
)
