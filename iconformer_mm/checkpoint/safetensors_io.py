"""Safetensors files: written whole or not at all, and read by MMEngine wherever it reads checkpoints."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import safetensors
from mmengine.runner import CheckpointLoader
from safetensors.torch import load_file, save_file
from torch import Tensor


@CheckpointLoader.register_scheme(prefixes=r'(?!\w+://).*\.safetensors$', force=True)
def load_safetensors(filename: str, map_location: str | None = None) -> dict[str, Tensor]:
    """Read a local safetensors file, for ``init_cfg``, ``load_from`` and the like.

    Args:
        filename: Path of the file.
        map_location: Device for the tensors. Defaults to None, the CPU.

    Returns:
        The state dict.

    Raises:
        FileNotFoundError: There is no such file.
        RuntimeError: The file is damaged or of another format.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'{path} cannot be found')
    try:
        return load_file(path, device=str(map_location or 'cpu'))
    except safetensors.SafetensorError as error:
        raise RuntimeError(f'{path} is no intact safetensors file: {error}') from error


def save_safetensors(
    tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, which appears at once and complete, or not at all.

    Args:
        tensors: What to write, by name; on any device.
        path: The file. Missing folders are made.
        metadata: Text to keep in the file's header.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'.{path.name}.') as folder:
        temporary = Path(folder) / path.name
        save_file({n: v.detach().cpu().contiguous() for n, v in tensors.items()}, temporary, metadata=metadata)
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
