"""Safetensors files: written whole or not at all, and checked when they are read."""

from __future__ import annotations

import hashlib
import json
import math
import os
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from iconformer_mm.files import expanded, written_whole
from iconformer_mm.version import __version__

CHECKSUM = 'checksum'
OURS = 'iconformer_mm'  # begins the keys of our metadata


class DamagedFileError(RuntimeError):
    """A file is truncated, altered or of another format."""


def shortened(value: Any, limit: int = 200) -> str:
    """A value out of a file as text for a message, on one line and of bounded length."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f'a deeply nested {type(value).__name__}'
    text = ''.join(c if c.isprintable() else '?' for c in text[: limit + 1])
    return text if len(text) <= limit else f'{text[:limit]}...'


def parse_json(text: str) -> Any:
    """Parse JSON out of a file. NaN and infinity, which JSON does not know and earlier releases wrote, are None.

    Args:
        text: The JSON.

    Raises:
        ValueError: It is none, is nested too deeply, or names a key twice: readers differ in which one they take.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_without_duplicates, parse_float=_finite, parse_constant=lambda name: None
        )
    except RecursionError:
        raise ValueError('its JSON is nested too deeply') from None


def _finite(text: str) -> float | None:
    """A number; None for one that JSON cannot hold (1e999)."""
    value = float(text)
    return value if math.isfinite(value) else None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"its JSON has the key '{shortened(twice, 50)}' twice")
    return content


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
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} cannot be found')
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f'{path} is no intact safetensors file: {shortened(str(error))}') from error
    # A key `checksum` in a file of others is theirs. Ours is known by more than the key, which may be what is damaged.
    ours = any(key.startswith(OURS) or '"package_version"' in text for key, text in metadata.items())
    if ours and checksum(tensors, metadata) != metadata.get(CHECKSUM):
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
        path: The file, ``~`` allowed. Missing folders are made.
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
    if not any(key.startswith(OURS) for key in metadata):
        metadata[f'{OURS}.version'] = __version__  # so that the checksum is known to be ours
    metadata[CHECKSUM] = checksum(content, metadata)
    with written_whole(expanded(path)) as temporary:
        save_file(content, temporary, metadata=metadata)
