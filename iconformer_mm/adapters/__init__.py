from .adaptformer import AdaptFormerAdapter
from .base import Adapter, BottleneckAdapter, TokenGrid
from .convpass import ConvpassAdapter
from .houlsby import HoulsbyAdapter
from .icon import ICoN, ICoNAdapter
from .lorand import LoRandAdapter
from .mona import MonaAdapter
from .prompt import PromptAdapter
from .weights import DeltaAdapter, DoRAAdapter, LoRAAdapter, SSFAdapter, Target, WeightAdapter

__all__ = [
    'Adapter',
    'AdaptFormerAdapter',
    'BottleneckAdapter',
    'ConvpassAdapter',
    'DeltaAdapter',
    'DoRAAdapter',
    'HoulsbyAdapter',
    'ICoN',
    'ICoNAdapter',
    'LoRAAdapter',
    'LoRandAdapter',
    'MonaAdapter',
    'PromptAdapter',
    'SSFAdapter',
    'Target',
    'TokenGrid',
    'WeightAdapter',
]
