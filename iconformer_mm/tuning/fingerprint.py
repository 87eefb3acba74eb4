"""Fingerprints of base weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .packing import is_packed, recorded_fingerprints

DIGITS = 64
_VALUES = 2**20  # that are rounded at a time


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
    stream = FingerprintStream(sets)
    for name, value in sorted(parameters.items()):
        stream.update(name, value)
    return stream.results()


class FingerprintStream:
    """Computes fingerprints of several sets of parameters, one parameter at a time.

    Args:
        sets: For each fingerprint, the names of its parameters.
    """

    def __init__(self, sets: Sequence[Iterable[str]]) -> None:
        self._sets = [set(names) for names in sets]
        self._digests = {dtype: [hashlib.sha256() for _ in sets] for dtype in (torch.bfloat16, torch.float16)}
        self._last = ''
        self._names: set[str] = set()

    def update(self, name: str, value: Tensor) -> None:
        """Add a parameter. Names must come in sorted order; those in none of the sets are ignored.

        Args:
            name: Its name.
            value: Its floating-point value.
        """
        assert name >= self._last, f'{name} after {self._last}'
        self._last = name
        self._names.add(name)
        if not any(name in names for names in self._sets):
            return
        head = f'{name} {tuple(value.shape)}\n'.encode()
        for dtype, digests in self._digests.items():
            chosen = [digest for digest, names in zip(digests, self._sets) if name in names]
            for digest in chosen:
                digest.update(head)
            # A part at a time, so that no copy of a large weight is made.
            for part in value.reshape(-1).split(_VALUES):
                rounded = part.to(device='cpu', dtype=dtype).view(torch.int16).numpy()
                for digest in chosen:
                    digest.update(rounded.data)

    def results(self) -> list[str]:
        """Return the fingerprints."""
        halves = zip(*self._digests.values())
        return [''.join(digest.hexdigest()[: DIGITS // 2] for digest in pair) for pair in halves]

    def complete(self) -> dict[bytes, str]:
        """Return the fingerprints of the sets that are complete, by :func:`hash_names`."""
        return {hash_names(s): f for s, f in zip(self._sets, self.results()) if s <= self._names}


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
