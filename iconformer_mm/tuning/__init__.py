from .accounting import WeightsError
from .families import FAMILIES, BlockFamily, register_family
from .injection import get_injection, inject, merge, remove, summarize, unmerge
from .methods import PEFTMethod, build_method
from .mixing import MixedBatch, mixed
from .summary import Summary
from .switching import active_adapter, add_adapter, delete_adapter, disabled, list_adapters, set_adapter

__all__ = [
    'FAMILIES',
    'BlockFamily',
    'MixedBatch',
    'PEFTMethod',
    'Summary',
    'WeightsError',
    'active_adapter',
    'add_adapter',
    'build_method',
    'delete_adapter',
    'disabled',
    'get_injection',
    'inject',
    'list_adapters',
    'merge',
    'mixed',
    'register_family',
    'remove',
    'set_adapter',
    'summarize',
    'unmerge',
]
