"""Ways to compute the dynamic convolution and the gradient of its kernels.

A backend is a module with two functions over token sequences, (B, P + H * W, C) with P
prefix tokens that have no place in the map:

- ``correlate(tokens, kernels, height, width)``: the filtered tokens; prefix tokens pass.
- ``kernel_gradient(grad, tokens, size, height, width)``: the gradient of the
  kernels, (B, C, K, K), for the gradient of what ``correlate`` returned.

The gradient of the tokens is ``correlate`` with flipped kernels. A backend that makes both gradients in
one pass has ``gradients(grad, tokens, kernels, height, width)``, too, which returns them in this order.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

NAMES = ('reference', 'grouped', 'looped', 'numba', 'triton')


@cache
def find(name: str) -> ModuleType | None:
    """The backend of a name; None if the package that it needs cannot be imported."""
    try:
        return importlib.import_module(f'{__name__}.{name}_backend')
    except ImportError as error:
        if error.name is not None and error.name.startswith(__name__):
            raise
        return None
