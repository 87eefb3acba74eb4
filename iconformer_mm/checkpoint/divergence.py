"""Detection of weights that a diverged run left behind."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def find_diverged(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that hold NaN or infinite values, as a diverged run leaves them.

    A mask, which holds only zeros and minus infinity, does not count.

    Args:
        tensors: Tensors by name, on any device.
    """
    return [name for name, value in tensors.items() if value.is_floating_point() and _has_diverged(value)]


def _has_diverged(value: Tensor) -> bool:
    value = value.detach()
    if value.element_size() < 4:
        value = value.float()  # some functions are not implemented for small dtypes
    if bool(torch.isfinite(value).all()):
        return False
    masked = value == -torch.inf
    return not (bool((masked | (value == 0)).all()) and not bool(masked.all()))


def diverged_error(names: list[str]) -> str:
    """Describe the diverged tensors, as a clause for an error message."""
    return f'{len(names)} tensors hold NaN or infinite values, such as {names[0]}'
