"""Pre-trained backbones of other programs, in the names of the mm libraries and of timm.

A file goes through one common set of names. :func:`recognise` brings its tensors there and says what
they are, by the names alone. A writer for each target then takes them all. What a target has no place for
is named, or is an error where the result would compute something else.
"""

from .conversion import TARGETS, ConvertedBackbone, convert_backbone, read_backbone
from .recognition import FAMILIES, ForeignBackboneError, Recognised, looks_like, recognise

__all__ = [
    'FAMILIES',
    'TARGETS',
    'ConvertedBackbone',
    'ForeignBackboneError',
    'Recognised',
    'convert_backbone',
    'looks_like',
    'read_backbone',
    'recognise',
]
