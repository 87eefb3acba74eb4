from .adapter_checkpoint_hook import AdapterCheckpointHook
from .adapter_statistics_hook import AdapterStatisticsHook
from .peft_hook import PEFTHook
from .weights_hook import WeightsHook

__all__ = ['AdapterCheckpointHook', 'AdapterStatisticsHook', 'PEFTHook', 'WeightsHook']
