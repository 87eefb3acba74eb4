from .adapter_file import AdapterFileError, fingerprint, load_adapter, save_adapter
from .safetensors_io import load_safetensors, save_safetensors

__all__ = ['AdapterFileError', 'fingerprint', 'load_adapter', 'load_safetensors', 'save_adapter', 'save_safetensors']
