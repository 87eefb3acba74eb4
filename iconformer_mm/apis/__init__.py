from .inferencer import AdapterInferencer
from .launch import (
    add_base,
    add_peft,
    build_runner,
    guard,
    leave_process_group,
    load_by_command_line,
    load_config,
    make_parser,
)

__all__ = [
    'AdapterInferencer',
    'add_base',
    'add_peft',
    'build_runner',
    'guard',
    'leave_process_group',
    'load_by_command_line',
    'load_config',
    'make_parser',
]
