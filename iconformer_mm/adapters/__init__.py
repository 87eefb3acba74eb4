from .adaptformer import AdaptFormerAdapter
from .base import Adapter, BottleneckAdapter, TokenGrid
from .icon import ICoN, ICoNAdapter

__all__ = ['Adapter', 'AdaptFormerAdapter', 'BottleneckAdapter', 'ICoN', 'ICoNAdapter', 'TokenGrid']
