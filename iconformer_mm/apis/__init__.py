from .launch import add_peft, build_runner, load_config, make_parser

__all__ = ['add_peft', 'build_runner', 'load_config', 'make_parser']
