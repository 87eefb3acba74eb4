"""Block families: where an adapter attaches in each known Transformer block.

A family is one entry of :data:`FAMILIES`. It names a block class by its import path, so that no model library is
imported here. In most families a block is attention and then an FFN, each added to the residual stream, and the
FFN's sum is the last thing it computes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from .base import (
    Argument,
    BlockFamily,
    FromBlock,
    FromPatchEmbed,
    FromShape,
    FromSquare,
    GridSource,
    NoGrid,
    Size,
    class_path,
)
from .openmmlab import OPENMMLAB
from .refused import REFUSED, why_refused
from .timm import TIMM

# Of several families of one class the last counts, so that a user's own wins.
FAMILIES: list[BlockFamily] = [*OPENMMLAB, *TIMM]


def family_of(block: nn.Module) -> BlockFamily | None:
    """The family that a module belongs to, the last one of several; None for any other module."""
    for cls in type(block).__mro__:
        if cls is nn.Module:
            break
        path = class_path(cls)
        for family in reversed(FAMILIES):
            if family.block in (path, cls.__name__) and family.includes(block):
                return family
    return None


def register_family(
    family: BlockFamily | None = None,
    *,
    like: str | BlockFamily | None = None,
    block: str | type | None = None,
    name: str | None = None,
    **changes: Any,
) -> BlockFamily:
    """Make a block known, for all models that are adapted from now on in this process.

    It wins over families of the same class that are known already.

    Args:
        family: The family. None for one that is ``like`` a known one.
        like: Name of a known family (``'mmdet Swin'``), or the family, whose block yours is a copy of.
        block: Your block's class, its import path, or its bare name.
        name: Name of the new family. Defaults to the name of the class.
        **changes: What else differs: fields of :class:`BlockFamily`.

    Returns:
        The family, as it is known from now on.

    Raises:
        ValueError: Neither a family nor ``like`` and ``block`` are given, the known family or a field does not exist.

    Example:
        >>> from iconformer_mm import register_family
        >>> register_family(like='mmdet Swin', block='my_project.swin.SwinBlock')
    """
    if family is None:
        if like is None or block is None:
            raise ValueError(
                "a family needs `like`, the name of a known one, and `block`, e.g. dict(like='mmdet Swin', "
                "block='my_project.swin.SwinBlock'); or give a BlockFamily"
            )
        known = {each.name: each for each in FAMILIES}
        if isinstance(like, str) and like not in known:
            raise ValueError(f'there is no family {like!r}{_hint(like, known)}; known: {", ".join(known)}')
        names = [field.name for field in fields(BlockFamily)]
        for change in changes:
            if change not in names:
                raise ValueError(f"a BlockFamily has no field '{change}'{_hint(change, names)}; its fields: {names}")
        if not isinstance(block, (str, type)) or not block:
            raise ValueError(f'block must be a class, its import path or its name, got {block!r}')
        path = class_path(block) if isinstance(block, type) else block
        source = known[like] if isinstance(like, str) else like
        family = replace(source, name=name or path.rpartition('.')[2], block=path, **changes)
    if family not in FAMILIES[-1:]:
        FAMILIES[:] = [each for each in FAMILIES if each != family] + [family]
    return family


def register_families(families: Iterable[BlockFamily | Mapping[str, Any]]) -> list[BlockFamily]:
    """Make several blocks known, each a :class:`BlockFamily` or the arguments of :func:`register_family`.

    Raises:
        ValueError: One of them is neither, or wrong. None is known then.
    """
    if isinstance(families, (str, Mapping)) or not isinstance(families, Iterable):
        raise ValueError(f'families must be a list of dict(like=..., block=...) or of BlockFamily, got {families!r}')
    before = list(FAMILIES)
    try:
        return [_register(each) for each in families]
    except ValueError:
        FAMILIES[:] = before
        raise


def _register(given: Any) -> BlockFamily:
    if isinstance(given, BlockFamily):
        return register_family(given)
    if not isinstance(given, Mapping) or 'family' in given:
        raise ValueError(f'families must be a list of dict(like=..., block=...) or of BlockFamily, got {given!r} in it')
    return register_family(**given)


def _hint(word: str, words: Iterable[str]) -> str:
    lower = {each.lower(): each for each in words}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.4)
    return f' (did you mean {lower[near[0]]!r}?)' if near else ''


__all__ = [
    'FAMILIES',
    'REFUSED',
    'Argument',
    'BlockFamily',
    'FromBlock',
    'FromPatchEmbed',
    'FromShape',
    'FromSquare',
    'GridSource',
    'NoGrid',
    'Size',
    'class_path',
    'family_of',
    'register_families',
    'register_family',
    'why_refused',
]
