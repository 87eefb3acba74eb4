"""Checks of tensors before compiled code, which does no bounds checking, reads their memory."""

from __future__ import annotations

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(first: str, tensor: Tensor, **others: Tensor) -> None:
    """Raise a ValueError unless all tensors are floating point and on one device.

    Args:
        first: Name of the first tensor.
        tensor: The first tensor.
        **others: The others, by name.
    """
    if tensor.dtype not in _DTYPES:
        _refuse_dtype(first, tensor)
    device = tensor.device
    for name, other in others.items():
        if other.dtype not in _DTYPES:
            _refuse_dtype(name, other)
        if other.device != device:
            raise ValueError(f'{first} and {name} must be on one device, got {device} and {other.device}')


def _refuse_dtype(name: str, tensor: Tensor) -> None:
    known = ', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES)
    raise ValueError(f'{name} must have one of the types {known}, got {tensor.dtype}')
