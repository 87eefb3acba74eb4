"""Reads every kind of safetensors file for MMEngine's checkpoint loader."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.runner import CheckpointLoader

from .adapter_file import is_adapter_file, parse_adapter
from .safetensors_io import read_safetensors
from .shards import find_stored
from .training_checkpoint import decode_checkpoint, is_checkpoint


def load_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a local safetensors file for MMEngine's ``init_cfg``, ``load_from``, ``resume`` and similar settings.

    Args:
        filename: Path of the file.
        map_location: Device for the tensors. Defaults to None: the CPU.

    Returns:
        The state dict. For a training checkpoint, the same content as MMEngine's own checkpoints. For an adapter
        file, its tensors as ``state_dict`` and its metadata as ``adapter_file``.

    Raises:
        AdapterFileError: The file is an adapter file whose metadata is damaged or too new.
        DamagedFileError: The file is damaged or not in the expected format.
        FileNotFoundError: The file does not exist.
    """
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
    """Call :func:`load_safetensors`. MMEngine logs the part of a loader's name that follows ``load_from_``."""
    return load_safetensors(filename, map_location)


@CheckpointLoader.register_scheme(prefixes=r'(?!\w+://).*\.safetensors\.index\.json$', force=True)
def load_from_safetensors_index(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read all shards of an index as one state dict. :func:`~.shards.load_shards` takes less memory."""
    state: dict[str, Any] = {}
    stored = find_stored(filename)
    for path in sorted({place.path for place in stored.values()}):
        with open(path, 'rb') as file:
            state.update({name: place.read(file) for name, place in stored.items() if place.path == path})
    if isinstance(map_location, (str, torch.device)):
        state = {name: value.to(map_location) for name, value in state.items()}
    return state
