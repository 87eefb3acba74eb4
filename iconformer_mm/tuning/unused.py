"""Blocks whose output nobody reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .injection import get_injection

# Where the hosts of all block families keep their blocks, or stages of blocks.
CONTAINERS = ('layers', 'stages', 'blocks')


def find_unused_blocks(backbone: nn.Module, names: Sequence[str]) -> list[str]:
    """Those blocks that come after the last one which a backbone's ``out_indices`` asks for.

    Most backbones run them all the same. What is trained there gets no gradient.

    Args:
        backbone: The backbone.
        names: Names of blocks in it.
    """
    unused = []
    for prefix, host in backbone.named_modules():
        indices = getattr(host, 'out_indices', None)
        indices = [indices] if isinstance(indices, int) else indices
        if not isinstance(indices, (list, tuple)) or not indices or not all(isinstance(i, int) for i in indices):
            continue
        for container in CONTAINERS:
            stages = getattr(host, container, None)
            if not isinstance(stages, (nn.ModuleList, nn.Sequential)):
                continue
            last = max(index if index >= 0 else len(stages) + index for index in indices)
            start = f'{prefix}.{container}.'.removeprefix('.')
            for name in names:
                place = name.removeprefix(start).partition('.')[0] if name.startswith(start) else ''
                if place.isdigit() and int(place) > last and name not in unused:
                    unused.append(name)
    return unused


def unused_adapters(model: nn.Module) -> str | None:
    """A sentence on adapters in blocks whose output nobody reads; None for a model without such.

    Args:
        model: A model, adapted or not.
    """
    injection = get_injection(model)
    if injection is None or injection.current is None:
        return None
    unused: list[str] = []
    for path, backbone in injection.backbones.items():
        pairs = zip(injection.current.paths, injection.current.attachments)
        names = [attachment.name for place, attachment in pairs if place == path]
        unused += [injection.full_name(path, name) for name in find_unused_blocks(backbone, names)]
    if not unused:
        return None
    return (
        f'{len(unused)} adapted blocks, {unused[0]} to {unused[-1]}, come after the last of out_indices, so their '
        'adapters get no gradient, and distributed training would wait for it: build the backbone without these '
        'blocks, adapt others by `blocks`, or set find_unused_parameters=True'
    )
