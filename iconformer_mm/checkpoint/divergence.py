"""Telling what a diverged run left from what was trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def find_diverged(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinite values, as a diverged run leaves them.

    A mask, of zeros and minus infinity only, is none of them.

    Args:
        tensors: Tensors by name, on any device.
    """
    return [name for name, value in tensors.items() if value.is_floating_point() and _has_diverged(value)]


def _has_diverged(value: Tensor) -> bool:
    value = value.detach()
    if value.element_size() < 4:
        value = value.float()  # for small types some functions are missing
    if bool(torch.isfinite(value).all()):
        return False
    masked = value == -torch.inf
    return not (bool((masked | (value == 0)).all()) and not bool(masked.all()))


def diverged_error(names: list[str]) -> str:
    """What is wrong with tensors that diverged, as the middle of a sentence."""
    return f'{len(names)} tensors hold NaN or infinite values, such as {names[0]}'
