from .adapter_checkpoint_hook import AdapterCheckpointHook
from .peft_hook import PEFTHook

__all__ = ['AdapterCheckpointHook', 'PEFTHook']
