from .adapter_file import (
    AdapterFileError,
    base_parameters,
    describe_adapter,
    fingerprint,
    hash_parameters,
    load_adapter,
    parse_adapter,
    read_adapter,
    same_base,
    save_adapter,
    write_adapter,
)
from .safetensors_io import DamagedFileError, load_safetensors, read_safetensors, save_safetensors

__all__ = [
    'AdapterFileError',
    'DamagedFileError',
    'base_parameters',
    'describe_adapter',
    'fingerprint',
    'hash_parameters',
    'load_adapter',
    'load_safetensors',
    'parse_adapter',
    'read_adapter',
    'read_safetensors',
    'same_base',
    'save_adapter',
    'save_safetensors',
    'write_adapter',
]
