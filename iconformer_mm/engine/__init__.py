from .hooks import PEFTHook
from .optim_wrapper_constructor import PEFTOptimWrapperConstructor

__all__ = ['PEFTHook', 'PEFTOptimWrapperConstructor']
