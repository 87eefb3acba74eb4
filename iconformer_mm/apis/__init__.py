"""Deprecated: the old place of what is in ``inference``, ``engine`` and ``cli`` now."""

from iconformer_mm.deprecation import moved

__getattr__ = moved(
    __name__,
    {
        'iconformer_mm.inference': ['AdapterInferencer'],
        'iconformer_mm.engine': ['add_peft', 'build_runner', 'leave_process_group', 'load_config'],
        'iconformer_mm.cli.parser': ['add_base', 'guard', 'load_by_command_line', 'make_parser'],
    },
)
