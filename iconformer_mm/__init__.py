"""Parameter-efficient fine-tuning for OpenMMLab with input-conditioned adapters.

Importing the package registers all its parts, so ``custom_imports =
dict(imports=['iconformer_mm'])`` is all that a config needs.
"""

from . import datasets, engine, models
from .checkpoint import load_adapter, save_adapter
from .tuning import inject, remove, summarize
from .version import __version__

__all__ = [
    '__version__',
    'datasets',
    'engine',
    'inject',
    'load_adapter',
    'models',
    'remove',
    'save_adapter',
    'summarize',
]
