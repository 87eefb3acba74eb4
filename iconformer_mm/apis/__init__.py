from .inferencer import AdapterInferencer
from .launch import add_peft, build_runner, leave_process_group, load_config, make_parser

__all__ = ['AdapterInferencer', 'add_peft', 'build_runner', 'leave_process_group', 'load_config', 'make_parser']
