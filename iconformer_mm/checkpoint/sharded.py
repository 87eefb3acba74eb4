"""Whole tensors of a model that is sharded over processes by torch's ``fully_shard``.

A sharded parameter is a ``DTensor``: it has the name and the shape of the whole, and holds a part. What gathers must be
called by all processes alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether a model holds parts of parameters."""
    return any(hasattr(parameter, 'full_tensor') for parameter in model.parameters())


def whole(value: Any) -> Any:
    """Return the whole of a sharded tensor. Anything else is returned as it is."""
    return value.full_tensor() if hasattr(value, 'full_tensor') else value


def wholes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole of each tensor."""
    return {name: whole(value.detach()) for name, value in tensors.items()}


def placed_like(value: Any, own: Tensor) -> Any:
    """Keep this process's part of a whole tensor, if a parameter is sharded and has its shape.

    Args:
        value: The whole tensor, equal on all processes. Anything else is returned as it is.
        own: The parameter.
    """
    if not isinstance(value, Tensor) or not hasattr(own, 'full_tensor') or value.shape != own.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = own
    # Each process has the whole, so nothing needs to be sent.
    return distribute_tensor(value.to(own.device), sharded.device_mesh, sharded.placements, src_data_rank=None)


def class_name(model: nn.Module) -> str:
    """Return the name of a model's class. ``fully_shard`` puts a subclass of its own in its place."""
    cls = type(model)
    if cls.__name__.startswith('FSDP') and hasattr(model, 'set_requires_gradient_sync'):
        return cls.__name__.removeprefix('FSDP')
    return cls.__name__
