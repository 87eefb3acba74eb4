from .adapter_file import AdapterFileError, fingerprint, load_adapter, read_adapter, same_base, save_adapter
from .safetensors_io import DamagedFileError, load_safetensors, read_safetensors, save_safetensors

__all__ = [
    'AdapterFileError',
    'DamagedFileError',
    'fingerprint',
    'load_adapter',
    'load_safetensors',
    'read_adapter',
    'read_safetensors',
    'same_base',
    'save_adapter',
    'save_safetensors',
]
