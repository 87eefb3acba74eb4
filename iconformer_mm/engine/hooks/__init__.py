from .peft_hook import PEFTHook

__all__ = ['PEFTHook']
