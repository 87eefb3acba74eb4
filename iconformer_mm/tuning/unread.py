"""Blocks of which only the class tokens are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .sites import Site, class_path

_BACKBONES = 'mmpretrain.models.backbones.'
_CLASS_TOKEN_ALWAYS = (_BACKBONES + 'tnt.TNT',)


def unread_patches(sites: Sequence[Site]) -> set[str]:
    """List the names of blocks whose patch tokens nobody reads: the last block of hosts that return only class tokens.

    Only certain cases count: hosts with the ``forward`` of an MMPretrain backbone, by their ``out_type``.

    Args:
        sites: All blocks of a backbone, in order.
    """
    hosts: dict[int, tuple[nn.Module, list[str]]] = {}
    for site in sites:
        if site.host is not None:
            hosts.setdefault(id(site.host), (site.host, []))[1].append(site.name)
    return {names[last] for host, names in hosts.values() for last in _last_read(host, len(names))}


def _last_read(host: Any, num_blocks: int) -> list[int]:
    """Return the index of the last block that is read, if only its class tokens are read."""
    if not str(type(host).forward.__module__).startswith(_BACKBONES):
        return []
    if any(class_path(cls) in _CLASS_TOKEN_ALWAYS for cls in type(host).__mro__):
        return [num_blocks - 1]
    indices = getattr(host, 'out_indices', None)
    if getattr(host, 'out_type', None) != 'cls_token' or not isinstance(indices, (list, tuple)) or not indices:
        return []
    last = max(index if index >= 0 else num_blocks + index for index in indices)
    return [last] if last < num_blocks else []
