from .launch import add_peft, build_runner, load_config

__all__ = ['add_peft', 'build_runner', 'load_config']
