"""Safetensors files of all kinds, as MMEngine's loader gives them."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.runner import CheckpointLoader

from .adapter_file import is_adapter_file, parse_adapter
from .safetensors_io import read_safetensors
from .training_checkpoint import decode_checkpoint, is_checkpoint


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
