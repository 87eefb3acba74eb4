from .hooks import AdapterCheckpointHook, PEFTHook
from .optim_wrapper_constructor import PEFTOptimWrapperConstructor
from .runner import CheckedRunner

__all__ = ['AdapterCheckpointHook', 'CheckedRunner', 'PEFTHook', 'PEFTOptimWrapperConstructor']
