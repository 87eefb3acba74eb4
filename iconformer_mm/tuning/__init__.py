from .injection import get_injection, inject, remove, summarize
from .methods import PEFTMethod, build_method
from .sites import FAMILIES, BlockFamily
from .summary import Summary

__all__ = [
    'FAMILIES',
    'BlockFamily',
    'PEFTMethod',
    'Summary',
    'build_method',
    'get_injection',
    'inject',
    'remove',
    'summarize',
]
