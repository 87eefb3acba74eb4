"""Safetensors files: written completely or not at all, and verified when read."""

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
OURS = 'iconformer_mm'  # prefix of our metadata keys


class DamagedFileError(RuntimeError):
    """A file is truncated, altered or not in the expected format."""


def shortened(value: Any, limit: int = 200) -> str:
    """Format a value from a file for a message: one line, bounded length."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except RecursionError:
        text = f'a deeply nested {type(value).__name__}'
    text = ''.join(c if c.isprintable() else '?' for c in text[: limit + 1])
    return text if len(text) <= limit else f'{text[:limit]}...'


def parse_json(text: str) -> Any:
    """Parse JSON from a file.

    NaN and infinity become None. They are not valid JSON, but earlier releases wrote them.

    Args:
        text: The JSON.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or repeats a key. Parsers disagree on which value of a
            repeated key wins.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_without_duplicates, parse_float=_finite, parse_constant=lambda name: None
        )
    except RecursionError:
        raise ValueError('its JSON is nested too deeply') from None


def _finite(text: str) -> float | None:
    """Parse a number. Return None if JSON cannot represent it (1e999)."""
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
    """Hexadecimal SHA-256 of the metadata and the tensors, including names, dtypes and shapes."""
    digest = hashlib.sha256()
    for key, text in sorted(metadata.items()):
        if key != CHECKSUM:
            digest.update(f'{key}={text}\n'.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_safetensors(path: str | os.PathLike) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read a safetensors file and verify its checksum, if it has one.

    Args:
        path: The file.

    Returns:
        The metadata, and the tensors on the CPU.

    Raises:
        DamagedFileError: The file is truncated, altered or not safetensors.
        FileNotFoundError: The file does not exist.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist')
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedFileError(f'{path} is not a valid safetensors file: {shortened(str(error))}') from error
    # Files of other programs may have a `checksum` key of their own. Do not rely on the key alone to recognise our
    # files: the key itself may be damaged.
    ours = any(key.startswith(OURS) or '"package_version"' in text for key, text in metadata.items())
    if ours and checksum(tensors, metadata) != metadata.get(CHECKSUM):
        raise DamagedFileError(
            f'{path} is not a valid safetensors file: its content does not match its checksum. It was altered or '
            'damaged after it was written. Use another copy'
        )
    return metadata, tensors


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Read the metadata of a safetensors file without its tensors.

    Args:
        path: The file.

    Returns:
        The metadata. Empty for what is not a valid safetensors file; :func:`read_safetensors` reports that.
    """
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            return dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError):
        return {}


def save_safetensors(
    tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file atomically: the complete file appears, or none.

    Args:
        tensors: Tensors by name, on any device. Tensors that share memory
            are written separately.
        path: The file. ``~`` is expanded and missing folders are created.
        metadata: Text for the file's header. A checksum is added.
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
        metadata[f'{OURS}.version'] = __version__  # marks the checksum as ours
    metadata[CHECKSUM] = checksum(content, metadata)
    with written_whole(expanded(path)) as temporary:
        save_file(content, temporary, metadata=metadata)
