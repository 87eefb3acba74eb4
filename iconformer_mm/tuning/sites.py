"""Block families: where an adapter attaches in each known Transformer block.

A family is one entry of :data:`FAMILIES`. It names a block class by its import
path, so that no model library is imported here, and says which submodule is the
FFN, whose input is the residual stream and how the token grid is known. In every
family a block is attention and then an FFN, each added to the residual stream,
and the FFN's sum is the last thing it computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .freezing import is_adapter

Size = tuple[int, int]


@dataclass(frozen=True)
class Argument:
    """The block is called with the grid's size.

    Attributes:
        name: Name of the argument.
        position: Its place among the positional arguments.
    """

    name: str
    position: int = 1


@dataclass(frozen=True)
class FromShape:
    """The block's input is a map, (B, H, W, d)."""


@dataclass(frozen=True)
class FromPatchEmbed:
    """The block sees a bare sequence; the host's patch embedding knows its grid.

    Attributes:
        read: ``(patch_embed, inputs, output) -> (height, width)``.
        num_prefix_tokens: Name of the host's attribute (a number or a flag), or
            the number itself where the host has no such attribute.
    """

    read: Callable[[nn.Module, tuple, Any], Size]
    num_prefix_tokens: str | int


@dataclass(frozen=True)
class BlockFamily:
    """How adapters attach to one class of blocks.

    Attributes:
        name: For people.
        block: Import path of the block's class. A subclass belongs to the
            family as long as it does not override ``forward``.
        grid: Where the token grid is known.
        norm: Name of the submodule whose (last) input is the residual stream
            x'. None where the FFN itself reads the residual stream: there
            ``input='normed'`` and ``'residual'`` are the same.
        ffn: Name of the FFN submodule, whose input is LN2(x').
        attention_norm: Name of the norm LN1 before attention, None where
            attention reads x itself.
        attention: Name of the attention submodule, where it is called with LN1(x) as a whole. None
            where it is called with windows of it; then the output of LN1 is taken.
        attention_out: Name of the submodule whose output, of the shape of the block's
            input, is the last that happens to the branch of attention before its sum
            (with the sum, where it is called with ``identity``). None where there is no such
            submodule, or the FFN uses it, too.
        ffn_out: The same for the branch of the FFN.
        shared_out: Name of the submodule that is the last of both branches, attention
            first. None where there is no such submodule.
        takes_prompts: Whether attention runs over any sequence, whatever the
            place of its tokens.
        idle: Submodules that the block never calls.
    """

    name: str
    block: str
    grid: Argument | FromShape | FromPatchEmbed
    norm: str | None
    ffn: str = 'ffn'
    attention_norm: str | None = 'norm1'
    attention: str | None = None
    attention_out: str | None = None
    ffn_out: str | None = None
    shared_out: str | None = None
    takes_prompts: bool = False
    idle: tuple[str, ...] = ()


def _read_resolution(patch_embed: nn.Module, inputs: tuple, output: Any) -> Size:
    """OpenMMLab: the patch embedding returns ``(tokens, (height, width))``."""
    height, width = output[1]
    return int(height), int(width)


def _read_timm(patch_embed: Any, inputs: tuple, output: Tensor) -> Size:
    """timm: a map (B, H, W, d) for dynamic image sizes, else a sequence."""
    if output.dim() == 4:
        return int(output.shape[1]), int(output.shape[2])
    height, width = patch_embed.dynamic_feat_size(inputs[0].shape[-2:])
    return int(height), int(width)


_MM_VIT = FromPatchEmbed(_read_resolution, 'num_extra_tokens')
_SEG_VIT = FromPatchEmbed(_read_resolution, 'with_cls_token')
_SEG_BEIT = FromPatchEmbed(_read_resolution, 1)
_MMPRETRAIN = 'mmpretrain.models.backbones.'
_MMDET = 'mmdet.models.backbones.'
_MMSEG = 'mmseg.models.backbones.'
_TIMM = 'timm.models.'

FAMILIES: list[BlockFamily] = [
    BlockFamily(
        'mmpretrain ViT',
        _MMPRETRAIN + 'vision_transformer.TransformerEncoderLayer',
        _MM_VIT,
        'ln2',
        attention_norm='ln1',
        attention='attn',
        attention_out='attn',
        ffn_out='ffn',
        takes_prompts=True,
    ),
    # DeiT III normalises the FFN's input by ln1 as well; its ln2 is never called.
    BlockFamily(
        'mmpretrain DeiT III',
        _MMPRETRAIN + 'deit3.DeiT3TransformerEncoderLayer',
        _MM_VIT,
        'ln1',
        attention_norm='ln1',
        attention='attn',
        attention_out='attn',
        ffn_out='ffn',
        takes_prompts=True,
        idle=('ln2',),
    ),
    BlockFamily(
        'mmpretrain BEiT',
        _MMPRETRAIN + 'beit.BEiTTransformerEncoderLayer',
        _MM_VIT,
        'ln2',
        attention_norm='ln1',
        shared_out='drop_path',
    ),
    BlockFamily(
        'mmpretrain EVA-02',
        _MMPRETRAIN + 'vit_eva02.EVA02EndcoderLayer',
        _MM_VIT,
        'norm2',
        ffn='mlp',
        shared_out='drop_path',
    ),
    # Attention runs on windows of LN1(x), and nothing follows that sees the whole map.
    BlockFamily(
        'mmpretrain ViT-SAM',
        _MMPRETRAIN + 'vit_sam.TransformerEncoderLayer',
        FromShape(),
        'ln2',
        attention_norm='ln1',
        ffn_out='ffn',
    ),
    BlockFamily(
        'mmpretrain Swin',
        _MMPRETRAIN + 'swin_transformer.SwinBlock',
        Argument('hw_shape'),
        'norm2',
        attention='attn',
        attention_out='attn',
        ffn_out='ffn',
    ),
    BlockFamily(
        'mmpretrain SwinV2',
        _MMPRETRAIN + 'swin_transformer_v2.SwinBlockV2',
        Argument('hw_shape'),
        None,
        attention_norm=None,
        attention_out='norm1',
        ffn_out='norm2',
    ),
    BlockFamily(
        'mmdet Swin',
        _MMDET + 'swin.SwinBlock',
        Argument('hw_shape'),
        'norm2',
        attention='attn',
        attention_out='attn',
        ffn_out='ffn',
    ),
    BlockFamily(
        'mmdet PVT',
        _MMDET + 'pvt.PVTEncoderLayer',
        Argument('hw_shape'),
        'norm2',
        attention='attn',
        attention_out='attn',
        ffn_out='ffn',
    ),
    BlockFamily(
        'mmseg Swin',
        _MMSEG + 'swin.SwinBlock',
        Argument('hw_shape'),
        'norm2',
        attention='attn',
        attention_out='attn',
        ffn_out='ffn',
    ),
    BlockFamily(
        'mmseg ViT',
        _MMSEG + 'vit.TransformerEncoderLayer',
        _SEG_VIT,
        'norm2',
        attention='attn',
        attention_out='attn',
        ffn_out='ffn',
        takes_prompts=True,
    ),
    # MAE's block is a BEiT block.
    BlockFamily('mmseg BEiT', _MMSEG + 'beit.BEiTTransformerEncoderLayer', _SEG_BEIT, 'norm2', shared_out='drop_path'),
    BlockFamily(
        'mmseg MiT',
        _MMSEG + 'mit.TransformerEncoderLayer',
        Argument('hw_shape'),
        'norm2',
        attention='attn',
        attention_out='attn',
        ffn_out='ffn',
    ),
    BlockFamily('mmseg Twins', _MMSEG + 'twins.LSAEncoderLayer', Argument('hw_shape'), 'norm2', shared_out='drop_path'),
    BlockFamily(
        'mmseg Twins global', _MMSEG + 'twins.GSAEncoderLayer', Argument('hw_shape'), 'norm2', shared_out='drop_path'
    ),
    BlockFamily(
        'timm ViT',
        _TIMM + 'vision_transformer.Block',
        FromPatchEmbed(_read_timm, 'num_prefix_tokens'),
        'norm2',
        ffn='mlp',
        attention_out='drop_path1',
        ffn_out='drop_path2',
        takes_prompts=True,
    ),
    BlockFamily(
        'timm Swin',
        _TIMM + 'swin_transformer.SwinTransformerBlock',
        FromShape(),
        'norm2',
        ffn='mlp',
        attention_out='drop_path1',
        ffn_out='drop_path2',
    ),
    BlockFamily(
        'timm SwinV2',
        _TIMM + 'swin_transformer_v2.SwinTransformerV2Block',
        FromShape(),
        None,
        ffn='mlp',
        attention_norm=None,
        attention_out='drop_path1',
        ffn_out='drop_path2',
    ),
]


@dataclass(frozen=True)
class Site:
    """One block that an adapter can attach to.

    Attributes:
        name: The block's name in the backbone.
        block: The block itself.
        family: Its family.
        embed_dims: Width d of its tokens.
        host: For :class:`FromPatchEmbed` families the module that owns the
            patch embedding. None for others, and where there is none.
    """

    name: str
    block: nn.Module
    family: BlockFamily
    embed_dims: int
    host: nn.Module | None


def host_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A module's own submodules by name, without adapters; like ``named_modules``."""
    return ((name, child) for name, child in module.named_modules() if not is_adapter(name))


def host_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's own parameters by name, without adapters; like ``named_parameters``."""
    return ((name, parameter) for name, parameter in module.named_parameters() if not is_adapter(name))


def class_path(cls: type) -> str:
    """Import path of a class."""
    return f'{cls.__module__}.{cls.__qualname__}'


def family_of(block: nn.Module) -> BlockFamily | None:
    """The family a module belongs to, None for any other module."""
    for cls in type(block).__mro__:
        for family in FAMILIES:
            if family.block == class_path(cls) and type(block).forward is getattr(cls, 'forward', None):
                return family
    return None


def _width(block: nn.Module, family: BlockFamily) -> int:
    """Token width: what the FFN's first layer reads."""
    ffn = getattr(block, family.ffn)
    for module in ffn.modules():
        # By attributes, which layers with packed weights have, too.
        width = getattr(module, 'in_features', getattr(module, 'in_channels', None))
        if isinstance(width, int):
            return width
    raise ValueError(
        f"'{family.ffn}' of the {family.name} block {type(block).__name__} has no linear layer or convolution with "
        '`in_features` or `in_channels`, so the width of its tokens is unknown'
    )


def _owner_of_patch_embed(backbone: nn.Module, name: str) -> nn.Module | None:
    """The innermost module around a block that has a patch embedding."""
    while name:
        name = name.rpartition('.')[0]
        host = backbone.get_submodule(name)
        if isinstance(getattr(host, 'patch_embed', None), nn.Module):
            return host
    return None


def find_sites(backbone: nn.Module) -> list[Site]:
    """List the blocks of a backbone that adapters can attach to, in order.

    Raises:
        ValueError: A block lacks a submodule that its family names.
    """
    sites = []
    for name, module in host_modules(backbone):
        family = family_of(module)
        if family is not None:
            named = (family.norm, family.attention_norm, family.attention_out, family.ffn_out, family.shared_out)
            for part in (family.ffn, family.attention, *named):
                if part is not None and not isinstance(getattr(module, part, None), nn.Module):
                    raise ValueError(
                        f"the block {name} has no submodule '{part}', which its BlockFamily '{family.name}' names; "
                        f'it has: {", ".join(n for n, _ in module.named_children())}'
                    )
            host = _owner_of_patch_embed(backbone, name) if isinstance(family.grid, FromPatchEmbed) else None
            sites.append(Site(name, module, family, _width(module, family), host))
    return sites


def no_site_error(backbone: nn.Module) -> ValueError:
    """What to raise for a backbone without sites: what was looked for and what was there."""
    known = '\n'.join(f'  {family.name:<20} {family.block}' for family in FAMILIES)
    return ValueError(
        f'no known Transformer block in {type(backbone).__name__}, so there is nowhere to put an adapter.\n'
        f'Looked for:\n{known}\n'
        f'Found:\n{_describe(backbone)}\n'
        'To adapt another backbone, add a BlockFamily for its block to iconformer_mm.tuning.sites.FAMILIES.'
    )


def _describe(backbone: nn.Module, limit: int = 12) -> str:
    """The module classes of a backbone, containers of the most parameters first."""
    sizes: Counter[str] = Counter()
    for module in backbone.modules():
        if any(True for _ in module.children()):
            sizes[class_path(type(module))] += sum(p.numel() for p in module.parameters())
    lines = [f'  {path}' for path, _ in sizes.most_common(limit)] or [f'  {class_path(type(backbone))}']
    return '\n'.join(lines)
