"""Fingerprints of base weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .packing import is_packed, recorded_fingerprints

DIGITS = 64


class UnknownBaseError(ValueError):
    """The fingerprint of a quantised base is not known."""


def hash_parameters(parameters: Mapping[str, Tensor]) -> str:
    """Compute the fingerprint of parameters by name; see :func:`iconformer_mm.checkpoint.fingerprint`.

    If some of them are quantised, it is the fingerprint of the base before that. It was recorded at the time.

    Args:
        parameters: Parameters by name, floating-point or packed.

    Raises:
        UnknownBaseError: Weights are packed, and no fingerprint over these names was recorded.
    """
    packed = [value for value in parameters.values() if is_packed(value)]
    if packed:
        return _recorded(packed, parameters)
    return hash_sets(parameters, [parameters])[0]


def hash_sets(parameters: Mapping[str, Tensor], sets: Sequence[Iterable[str]]) -> list[str]:
    """Compute the fingerprints of several sets of parameters in one pass over the values.

    Args:
        parameters: Floating-point parameters by name.
        sets: For each fingerprint, the names of its parameters.
    """
    chosen = [set(names) for names in sets]
    halves: list[list[str]] = [[] for _ in chosen]
    for dtype in (torch.bfloat16, torch.float16):
        digests = [hashlib.sha256() for _ in chosen]
        for name, value in sorted(parameters.items()):
            head = f'{name} {tuple(value.shape)}\n'.encode()
            rounded = value.to(device='cpu', dtype=dtype).contiguous().view(torch.int16).numpy()
            for digest, names in zip(digests, chosen):
                if name in names:
                    digest.update(head)
                    digest.update(rounded.data)
        for digest, half in zip(digests, halves):
            half.append(digest.hexdigest()[: DIGITS // 2])
    return [''.join(half) for half in halves]


def _recorded(packed: Sequence[Tensor], names: Iterable[str]) -> str:
    """Return the fingerprint that all packed weights recorded over these names."""
    key = hash_names(names)
    found = {recorded_fingerprints(value).get(key) for value in packed}
    value = found.pop()
    if found or value is None:
        raise UnknownBaseError(
            'the base is quantised, and its fingerprint before that is not known for these tensors. Load all of its '
            'weights into the model at once, in floating point'
        )
    return value


def hash_names(names: Iterable[str]) -> bytes:
    """Identify a set of names, in 8 bytes."""
    return hashlib.sha256('\n'.join(sorted(names)).encode()).digest()[:8]


def same_base(first: str, second: str) -> bool:
    """Whether two fingerprints identify the same weights. One of the copies may be in half precision."""
    half = DIGITS // 2
    return len(first) == len(second) == DIGITS and (first[:half] == second[:half] or first[half:] == second[half:])
