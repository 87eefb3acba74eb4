from .adapters import AdapterMethod
from .base import FrozenBackbone, FullFineTuning, PEFTMethod, Towers, build_method
from .prompts import VPTMethod
from .weights import WeightMethod

__all__ = [
    'AdapterMethod',
    'FrozenBackbone',
    'FullFineTuning',
    'PEFTMethod',
    'Towers',
    'VPTMethod',
    'WeightMethod',
    'build_method',
]
