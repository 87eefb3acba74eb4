"""Ways to compute the dynamic convolution and the gradient of its kernels.

A backend is a module with three functions over token sequences, (B, P + H * W, C) with P
prefix tokens that have no place in the map:

- ``correlate(tokens, kernels, height, width)``: the filtered tokens; prefix tokens pass.
- ``kernel_gradient(grad, tokens, size, height, width)``: the gradient of the
  kernels, (B, C, K, K), for the gradient of what ``correlate`` returned.
- ``gradients(grad, tokens, kernels, height, width)``: that of the tokens, which is ``correlate``
  with flipped kernels, and that of the kernels; in one pass, or :func:`apart`.

A backend for one kind of device has ``check_device(tensor)``, too, which raises a RuntimeError elsewhere.

FilterNorm has backends of its own, ``numba_norm`` and ``triton_norm``: modules with ``normalise`` and ``gradients``.
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
    """A backend's ``gradients``, made of its two other functions."""

    def gradients(grad: Tensor, tokens: Tensor, kernels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
        grad_tokens = correlate(grad, kernels.flip((2, 3)), height, width)
        return grad_tokens, kernel_gradient(grad, tokens, kernels.shape[-1], height, width)

    return gradients


def check_device(backend: ModuleType, tensor: Tensor) -> None:
    """Raise a RuntimeError unless a backend computes where a tensor is."""
    check = getattr(backend, 'check_device', None)
    if check is not None:
        check(tensor)


@cache
def find(name: str) -> ModuleType | None:
    """The backend of a name; None if the package that it needs cannot be imported."""
    try:
        return importlib.import_module(f'{__name__}.{name}_backend')
    except ImportError as error:
        if error.name is not None and error.name.startswith(__name__):
            raise
        return None
