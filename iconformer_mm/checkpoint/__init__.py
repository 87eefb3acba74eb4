from .adapter_file import AdapterFileError, fingerprint, load_adapter, save_adapter
from .safetensors_loader import load_safetensors

__all__ = ['AdapterFileError', 'fingerprint', 'load_adapter', 'load_safetensors', 'save_adapter']
