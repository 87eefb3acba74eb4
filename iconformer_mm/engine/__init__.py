from .hooks import PEFTHook
from .optim_wrapper_constructor import PEFTOptimWrapperConstructor
from .runner import CheckedRunner

__all__ = ['CheckedRunner', 'PEFTHook', 'PEFTOptimWrapperConstructor']
