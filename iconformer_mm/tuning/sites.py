"""The blocks of a backbone that adapters can attach to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .families import (
    FAMILIES,
    Argument,
    BlockFamily,
    FromPatchEmbed,
    FromShape,
    GridSource,
    class_path,
    family_of,
    why_refused,
)
from .freezing import is_adapter
from .quantised_weight import named_weights

__all__ = [
    'FAMILIES',
    'Argument',
    'BlockFamily',
    'FromPatchEmbed',
    'FromShape',
    'Site',
    'class_path',
    'family_of',
    'find_sites',
    'host_modules',
    'host_parameters',
    'no_site_error',
]


@dataclass(frozen=True)
class Site:
    """One block that an adapter can attach to.

    Attributes:
        name: The block's name in the backbone.
        block: The block itself.
        family: Its family.
        embed_dims: Width d of its tokens.
        source: Which of its family's sources says where its token grid is known.
        host: For :class:`FromPatchEmbed` the module around the block that owns the
            patch embedding. None for others, and where there is none.
        patch_embed: The host's module that knows the grid. None where there is no host.
    """

    name: str
    block: nn.Module
    family: BlockFamily
    embed_dims: int
    source: int = 0
    host: nn.Module | None = None
    patch_embed: nn.Module | None = None

    @property
    def grid(self) -> GridSource:
        """Where its token grid is known."""
        return self.family.sources[self.source]

    @property
    def branches(self) -> tuple[str, ...]:
        """The branches of the block that an adapter can stand parallel to."""
        return self.family.branches

    @property
    def reshapes(self) -> bool:
        """Whether attention changes number or width of the tokens."""
        return self.family.reshapes is not None and self.family.reshapes(self.block)


def host_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module's own submodules by name, without adapters; like ``named_modules``."""
    return ((name, child) for name, child in module.named_modules() if not is_adapter(name))


def host_parameters(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's own parameters by name, without adapters; like ``named_parameters``, quantised ones included."""
    return ((name, parameter) for name, parameter in named_weights(module) if not is_adapter(name))


def _width(block: nn.Module, family: BlockFamily) -> int:
    """Token width: what the FFN's first layer reads."""
    ffn = block.get_submodule(family.ffn)
    for module in ffn.modules():
        # By attributes, which layers with packed weights have, too.
        width = getattr(module, 'in_features', getattr(module, 'in_channels', None))
        if isinstance(width, int):
            return width
    raise ValueError(
        f"'{family.ffn}' of the {family.name} block {type(block).__name__} has no linear layer or convolution with "
        '`in_features` or `in_channels`, so the width of its tokens is unknown'
    )


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    """A submodule by name, None where there is none."""
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _place_of_grid(
    backbone: nn.Module, block: str, family: BlockFamily
) -> tuple[int, nn.Module | None, nn.Module | None]:
    """Where the grid of a block is known: which source, and for one of a host the host and its module."""
    sources = {i: source for i, source in enumerate(family.sources) if isinstance(source, FromPatchEmbed)}
    path = block
    while path and sources:
        path = path.rpartition('.')[0]
        host = backbone.get_submodule(path)
        classes = [class_path(cls) for cls in type(host).__mro__]
        for index, source in sources.items():
            if source.host is None or source.host in classes:
                inside = block.removeprefix(f'{path}.')
                module = _submodule(host, source.module if isinstance(source.module, str) else source.module(inside))
                if module is not None:
                    return index, host, module
    others = [i for i in range(len(family.sources)) if i not in sources]
    return (others or list(sources))[-1], None, None


def find_sites(backbone: nn.Module) -> list[Site]:
    """List the blocks of a backbone that adapters can attach to, in order.

    Raises:
        ValueError: A block lacks a submodule that its family names.
    """
    sites: list[Site] = []
    for name, module in host_modules(backbone):
        family = family_of(module)
        if family is not None:
            named = (family.norm, family.attention_norm, family.attention_out, family.ffn_out, family.shared_out)
            for part in (family.ffn, family.attention, family.skip, *named):
                if part is not None and _submodule(module, part) is None:
                    raise ValueError(
                        f"the block {name} has no submodule '{part}', which its BlockFamily '{family.name}' names; "
                        f'it has: {", ".join(n for n, _ in module.named_children())}'
                    )
            sites.append(Site(name, module, family, _width(module, family), *_place_of_grid(backbone, name, family)))
    return sites


def no_site_error(backbone: nn.Module) -> ValueError:
    """What to raise for a backbone without sites: the reason, or what was looked for and what was there."""
    refused = why_refused(backbone)
    if refused:
        path, reason = next(iter(refused.items()))
        return ValueError(
            f'blocks of {type(backbone).__name__} ({path}) take no adapters: {reason}. Methods that need no blocks '
            'work: bitfit, norm, ssf, frozen, full'
        )
    known = '\n'.join(f'  {family.name:<20} {family.block}' for family in FAMILIES)
    return ValueError(
        f'no known Transformer block in {type(backbone).__name__}, so there is nowhere to put an adapter.\n'
        f'Looked for:\n{known}\n'
        f'Found:\n{_describe(backbone)}\n'
        "To adapt another backbone, make its block known: register_family(like='NAME', block='PATH') where it is a "
        'copy of a known one, register_family(BlockFamily(...)) where it is not.'
    )


def _describe(backbone: nn.Module, limit: int = 12) -> str:
    """The module classes of a backbone, containers of the most parameters first."""
    sizes: Counter[str] = Counter()
    for module in backbone.modules():
        if any(True for _ in module.children()):
            sizes[class_path(type(module))] += sum(p.numel() for p in module.parameters())
    lines = [f'  {path}' for path, _ in sizes.most_common(limit)] or [f'  {class_path(type(backbone))}']
    return '\n'.join(lines)
