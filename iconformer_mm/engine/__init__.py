from .bfloat16_optim_wrapper import BFloat16OptimWrapper
from .config import add_peft, load_config
from .deepspeed_strategy import AdapterDeepSpeedStrategy
from .flexible_runner import CheckedFlexibleRunner
from .hooks import AdapterCheckpointHook, AdapterStatisticsHook, PEFTHook, WeightsHook
from .launch import build_runner, exempt_from_collection, leave_process_group
from .optim_wrapper_constructor import PEFTOptimWrapperConstructor
from .runner import CheckedRunner
from .strategies import FullyShardStrategy

__all__ = [
    'AdapterCheckpointHook',
    'AdapterDeepSpeedStrategy',
    'AdapterStatisticsHook',
    'BFloat16OptimWrapper',
    'CheckedFlexibleRunner',
    'CheckedRunner',
    'FullyShardStrategy',
    'PEFTHook',
    'PEFTOptimWrapperConstructor',
    'WeightsHook',
    'add_peft',
    'build_runner',
    'exempt_from_collection',
    'leave_process_group',
    'load_config',
]
