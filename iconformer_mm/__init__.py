"""Parameter-efficient fine-tuning for OpenMMLab with input-conditioned adapters.

Importing the package registers all its parts, so ``custom_imports =
dict(imports=['iconformer_mm'])`` is all that a config needs. From then on
``_base_ = 'iconformer_mm::...'`` finds our configs, too.
"""

try:
    from . import datasets, engine, models
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    raise ImportError(
        'iconformer_mm needs MMEngine, which is not installed: pip install onedl-mmengine, or mmengine beside the '
        "original OpenMMLab releases. The extras bring whole libraries: pip install 'iconformer_mm[cls]' (or det, seg)"
    ) from None
from .checkpoint import load_adapter, save_adapter
from .compat import map_config_packages
from .tuning import (
    BlockFamily,
    active_adapter,
    add_adapter,
    delete_adapter,
    disabled,
    inject,
    list_adapters,
    merge,
    mixed,
    register_family,
    remove,
    set_adapter,
    summarize,
    unmerge,
)
from .version import __version__

map_config_packages()

__all__ = [
    'BlockFamily',
    '__version__',
    'active_adapter',
    'add_adapter',
    'datasets',
    'delete_adapter',
    'disabled',
    'engine',
    'inject',
    'list_adapters',
    'load_adapter',
    'merge',
    'mixed',
    'models',
    'register_family',
    'remove',
    'save_adapter',
    'set_adapter',
    'summarize',
    'unmerge',
]
