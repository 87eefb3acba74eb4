from .bfloat16_optim_wrapper import BFloat16OptimWrapper
from .hooks import AdapterCheckpointHook, AdapterStatisticsHook, PEFTHook, WeightsHook
from .optim_wrapper_constructor import PEFTOptimWrapperConstructor
from .runner import CheckedRunner

__all__ = [
    'AdapterCheckpointHook',
    'AdapterStatisticsHook',
    'BFloat16OptimWrapper',
    'CheckedRunner',
    'PEFTHook',
    'PEFTOptimWrapperConstructor',
    'WeightsHook',
]
