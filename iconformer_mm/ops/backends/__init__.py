"""Backends of the dynamic convolution and of its gradients.

A backend is a module with three functions. They take token sequences (B, P + H * W, C) with P
prefix tokens, which are not part of the map:

- ``correlate(tokens, kernels, height, width)`` returns the filtered tokens. Prefix tokens pass
  through unchanged.
- ``kernel_gradient(grad, tokens, size, height, width)`` returns the gradient of the kernels,
  (B, C, K, K). ``grad`` is the gradient of the output of ``correlate``.
- ``gradients(grad, tokens, kernels, height, width)`` returns the gradients of the tokens and of
  the kernels. The former is ``correlate`` with flipped kernels. A backend computes both in one
  pass, or uses :func:`apart`.

A backend for one device type also has ``check_device(tensor)``, which raises a RuntimeError for other devices.

FilterNorm has separate backends, ``numba_norm`` and ``triton_norm``. They are modules with ``normalise`` and
``gradients``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from types import ModuleType

from torch import Tensor

NAMES = ('reference', 'grouped', 'looped', 'numba', 'triton')


def apart(
    correlate: Callable[..., Tensor], kernel_gradient: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Build a backend's ``gradients`` from its two other functions."""

    def gradients(grad: Tensor, tokens: Tensor, kernels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        grad_tokens = correlate(grad, kernels.flip((2, 3)), height, width)
        return grad_tokens, kernel_gradient(grad, tokens, kernels.shape[-1], height, width)

    return gradients


def check_device(backend: ModuleType, tensor: Tensor) -> None:
    """Raise a RuntimeError unless a backend supports the device of a tensor."""
    check = getattr(backend, 'check_device', None)
    if check is not None:
        check(tensor)


@cache
def find(name: str) -> ModuleType | None:
    """Return the backend with a name, or None if the package that it needs cannot be imported."""
    try:
        return importlib.import_module(f'{__name__}.{name}_backend')
    except ImportError as error:
        if error.name is not None and error.name.startswith(__name__):
            raise
        return None
