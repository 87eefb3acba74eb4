"""Safetensors files: written whole or not at all, checked when read, known to MMEngine's loader."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from mmengine.runner import CheckpointLoader
from safetensors.torch import save_file
from torch import Tensor

CHECKSUM = 'checksum'
OURS = 'iconformer_mm'  # begins the keys of our metadata
# Begins the names of folders in which files are written; what a killed process leaves can be told by it.
TEMPORARY = '.writing-'


class DamagedFileError(RuntimeError):
    """A file is truncated, altered or of another format."""


def checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 over metadata and tensors, names, types and shapes included, in hexadecimal."""
    digest = hashlib.sha256()
    for key, text in sorted(metadata.items()):
        if key != CHECKSUM:
            digest.update(f'{key}={text}\n'.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a safetensors file, and compare it with its checksum if it has one.

    Args:
        path: The file.

    Returns:
        Its metadata and its tensors, on the CPU.

    Raises:
        DamagedFileError: It is truncated, altered or of another format.
        FileNotFoundError: There is none.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f'{path} cannot be found')
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f'{path} is no intact safetensors file: {error}') from error
    # Files of others have no checksum; ours always do.
    ours = any(key.startswith(OURS) for key in metadata)
    if (ours or CHECKSUM in metadata) and checksum(tensors, metadata) != metadata.get(CHECKSUM):
        raise DamagedFileError(
            f'{path} is no intact safetensors file: its content does not match its checksum, so it was altered or '
            'damaged after it was written. Take another copy of it'
        )
    return metadata, tensors


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Read the metadata of a safetensors file, and none of its tensors.

    Args:
        path: The file.

    Returns:
        The metadata; empty for what is no intact safetensors file, which reading the whole will tell.
    """
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError):
        return {}


def save_safetensors(
    tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file, which appears at once and complete, or not at all.

    Args:
        tensors: What to write, by name; on any device. Tensors that share
            memory are written one by one.
        path: The file. Missing folders are made.
        metadata: Text to keep in the file's header; a checksum joins it.
    """
    seen: set[int] = set()
    content = {}
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        content[name] = value.clone() if storage in seen else value
        seen.add(storage)
    metadata = dict(metadata or {})
    metadata[CHECKSUM] = checksum(content, metadata)
    with written_whole(Path(path)) as temporary:
        save_file(content, temporary, metadata=metadata)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary file to write, which takes the path's place when it is complete, or vanishes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'{TEMPORARY}{path.name}.') as folder:
        temporary = Path(folder) / path.name
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def load_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a local safetensors file for MMEngine: ``init_cfg``, ``load_from``, ``resume`` and the like.

    Args:
        filename: Path of the file.
        map_location: Device for the tensors. Defaults to None, the CPU.

    Returns:
        The state dict; of a training checkpoint all that MMEngine's own hold; of an adapter file
        its tensors as ``state_dict`` and its metadata as ``adapter_file``.

    Raises:
        AdapterFileError: The file is an adapter file whose metadata is damaged or too new.
        DamagedFileError: The file is damaged or of another format.
        FileNotFoundError: There is no such file.
    """
    from .adapter_file import is_adapter_file, parse_adapter
    from .training_checkpoint import decode_checkpoint, is_checkpoint

    metadata, tensors = read_safetensors(filename)
    if isinstance(map_location, (str, torch.device)):
        tensors = {name: value.to(map_location) for name, value in tensors.items()}
    if is_checkpoint(metadata):
        return decode_checkpoint(metadata, tensors, filename)
    if is_adapter_file(metadata):
        return dict(meta={}, state_dict=tensors, adapter_file=parse_adapter(metadata, filename))
    return tensors


@CheckpointLoader.register_scheme(prefixes=r'(?!\w+://).*\.safetensors$', force=True)
def load_from_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """:func:`load_safetensors` for MMEngine, which logs what follows ``load_from_`` in a loader's name."""
    return load_safetensors(filename, map_location)
