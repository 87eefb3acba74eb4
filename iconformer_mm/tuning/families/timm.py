"""Families of timm."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import Argument, BlockFamily, FromPatchEmbed, FromShape, Rows, Size
from .openmmlab import head_by_head


def _read_patch_embed(patch_embed: Any, inputs: tuple, output: Any) -> Size:
    """A map (B, H, W, d) for dynamic image sizes, else a sequence."""
    if output.dim() == 4:
        return int(output.shape[1]), int(output.shape[2])
    height, width = patch_embed.dynamic_feat_size(inputs[0].shape[-2:])
    return int(height), int(width)


def _read_naflex(embeds: Any, inputs: tuple, output: Any) -> Size:
    """NaFlexViT: the grid of images; patches of images of several sizes in a batch have none."""
    if output[1] is None:
        raise ValueError(
            'NaFlexViT was called with patches of images of several sizes, whose tokens lie on no common grid; call it '
            'with images, or use a method that asks for no grid, such as adaptformer, lora or ssf'
        )
    height, width = output[1]
    return int(height), int(width)


def _read_pit(stage: Any, inputs: tuple, output: Any) -> tuple[int, int, int]:
    """PiT: a stage reads a map (B, d, H, W), which it may pool, and class tokens."""
    maps, cls_tokens = inputs[0]
    sides = list(maps.shape[-2:])
    if stage.pool is not None:
        conv = stage.pool.conv
        sides = [
            (side + 2 * padding - kernel) // stride + 1
            for side, padding, kernel, stride in zip(sides, conv.padding, conv.kernel_size, conv.stride)
        ]
    return sides[0], sides[1], cls_tokens.shape[1]


def _read_crossvit(patch_embed: Any, inputs: tuple, output: Any) -> Size:
    """CrossViT: each branch has images of one size."""
    (height, width), (patch_height, patch_width) = patch_embed.img_size, patch_embed.patch_size
    return height // patch_height, width // patch_width


def _crossvit_branch(block: str) -> str:
    """CrossViT: the patch embedding of the branch of ``blocks.STAGE.blocks.BRANCH.NUMBER``."""
    return f'patch_embed.{block.split(".")[3]}'


def _read_tnt(pixel_embed: Any, inputs: tuple, output: Any) -> Size:
    """TNT: images of one size."""
    height, width = pixel_embed.grid_size
    return int(height), int(width)


def _read_hiera(unroll: Any, inputs: tuple, output: Any) -> Size:
    """Hiera: images of one size, whose patches are put into the order of mask units."""
    height, width = unroll.size
    return height, width


def _hiera_order(block: Any, size: Size, num_tokens: int) -> tuple[Size, Tensor]:
    """Hiera: of tokens in the order of mask units, the outermost is which of four neighbours a token is.

    Each pooling of queries takes the outermost four together, so that the number of tokens tells the grid.
    """
    (height, width), pooled = size, 0
    while height * width > num_tokens:
        height, width, pooled = height // 2, width // 2, pooled + 1
    if height * width != num_tokens:
        raise ValueError(
            f'Hiera ran on {num_tokens} tokens of a grid of {size[0]} x {size[1]}: with some of them masked they lie '
            'on no grid; use a method that asks for none, such as adaptformer, lora or ssf'
        )
    places = torch.arange(num_tokens).view(1, height, width)
    # After the block's own pooling a mask unit has this many tokens, four for each pooling that is to come.
    for _ in range(block.attn.window_size.bit_length() // 2):
        places = places.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 2, 4, 1, 3).flatten(0, 2)
    return (height, width), places.flatten()


def _tinyvit_rows(block: Any) -> Rows:
    attention = block.attn
    return head_by_head('attn.qkv.weight', attention.num_heads, attention.key_dim, attention.val_dim)


def _maxvit_rows(block: Any) -> Rows:
    attention = block.attn
    size = attention.dim_head
    if attention.head_first:
        return head_by_head('attn.qkv.weight', attention.num_heads, size, size)
    rows = attention.num_heads * size
    return {role: ('attn.qkv.weight', i * rows, (i + 1) * rows, 1) for i, role in enumerate('qkv')}


def _parallel_rows(block: Any) -> Rows:
    """One projection makes the hidden values of the FFN, then q, k and v; one or two project back."""
    ends = [sum(block.in_split[: i + 1]) for i in range(len(block.in_split))]
    rows = {role: ('in_proj.weight', first, last, 1) for role, first, last in zip('qkv', ends, ends[1:])}
    rows['fc1'] = ('in_proj.weight', 0, ends[0], 1)
    if getattr(block, 'out_proj', None) is None:
        rows['o'] = ('attn_out_proj.weight', 0, block.attn_out_proj.out_features, 1)
        rows['fc2'] = ('mlp_out_proj.weight', 0, block.mlp_out_proj.out_features, 1)
    return rows


def _mvit_grid_after(block: Any, size: Size) -> Size:
    pool = block.shortcut_pool_attn
    if pool is None:
        return size
    height, width = (
        (side + 2 * padding - kernel) // stride + 1
        for side, padding, kernel, stride in zip(size, pool.padding, pool.kernel_size, pool.stride)
    )
    return height, width


_TIMM = 'timm.models.'
_PATCH_EMBED = FromPatchEmbed(_read_patch_embed, 'num_prefix_tokens')
_NAFLEX = FromPatchEmbed(_read_naflex, 'num_prefix_tokens', module='embeds', host=_TIMM + 'naflexvit.NaFlexVit')

# Blocks with a DropPath for each branch, which is the identity where its rate is zero.
_block = partial(BlockFamily, norm='norm2', ffn='mlp', attention_out='drop_path1', ffn_out='drop_path2')
_postnorm = partial(_block, norm=None, attention_norm=None)
_parallel = partial(
    BlockFamily,
    norm='in_norm',
    ffn='in_proj',
    attention_norm=None,
    attention='in_proj',
    attention_out='drop_path',
    ffn_out='drop_path',
    direct=False,
    rows=_parallel_rows,
)

TIMM: list[BlockFamily] = [
    _block(
        'timm ViT',
        _TIMM + 'vision_transformer.Block',
        (
            FromPatchEmbed(_read_pit, 0, module='', host=_TIMM + 'pit.Transformer', before=True),
            FromPatchEmbed(_read_crossvit, 1, module=_crossvit_branch, host=_TIMM + 'crossvit.CrossVit'),
            _NAFLEX,
            _PATCH_EMBED,
        ),
        takes_prompts=True,
    ),
    _postnorm('timm ViT post-norm', _TIMM + 'vision_transformer.ResPostBlock', _PATCH_EMBED, takes_prompts=True),
    _parallel('timm ViT parallel', _TIMM + 'vision_transformer.ParallelScalingBlock', _PATCH_EMBED, takes_prompts=True),
    _parallel(
        'timm ViT differential',
        _TIMM + 'vision_transformer.DiffParallelScalingBlock',
        _PATCH_EMBED,
        takes_prompts=True,
    ),
    _block('timm EVA', _TIMM + 'eva.EvaBlock', (_NAFLEX, _PATCH_EMBED)),
    _postnorm('timm EVA post-norm', _TIMM + 'eva.EvaBlockPostNorm', _PATCH_EMBED),
    _block('timm BEiT', _TIMM + 'beit.Block', _PATCH_EMBED),
    # DropPath of attention sees windows.
    _block('timm ViT-SAM', _TIMM + 'vision_transformer_sam.Block', FromShape(), attention_out=None),
    _block('timm ViT relative', _TIMM + 'vision_transformer_relpos.RelPosBlock', _PATCH_EMBED),
    _postnorm('timm ViT relative post-norm', _TIMM + 'vision_transformer_relpos.ResPostRelPosBlock', _PATCH_EMBED),
    _block('timm Swin', _TIMM + 'swin_transformer.SwinTransformerBlock', FromShape()),
    _postnorm('timm SwinV2', _TIMM + 'swin_transformer_v2.SwinTransformerV2Block', FromShape()),
    # The class token comes after these blocks, in others over the class token alone, which stay as they are.
    BlockFamily(
        'timm CaiT',
        _TIMM + 'cait.LayerScaleBlock',
        FromPatchEmbed(_read_patch_embed, 0),
        'norm2',
        ffn='mlp',
        shared_out='drop_path',
        takes_prompts=True,
    ),
    # A convolution (local patch interaction) stands between attention and the FFN.
    _block('timm XCiT', _TIMM + 'xcit.XCABlock', Argument('H', width='W'), direct=False),
    *(
        _block(
            f'timm DaViT {kind}',
            f'{_TIMM}davit.{kind.capitalize()}Block',
            FromShape(),
            direct=False,
            skip='norm1',
            channels_first=('',),
        )
        for kind in ('spatial', 'channel')
    ),
    # The norms of attention and FFN lie within them, and attention runs on windows.
    _postnorm('timm TinyViT', _TIMM + 'tiny_vit.TinyVitBlock', FromShape(), direct=False, rows=_tinyvit_rows),
    _block(
        'timm MViT',
        _TIMM + 'mvitv2.MultiScaleBlock',
        Argument('feat_size', num_prefix_tokens=lambda block: int(block.has_cls_token)),
        reshapes=lambda block: block.shortcut_pool_attn is not None or block.shortcut_proj_attn is not None,
        grid_after=_mvit_grid_after,
        where=lambda block: block.shortcut_proj_mlp is None,
    ),
    _block('timm PVTv2', _TIMM + 'pvt_v2.Block', Argument('feat_size')),
    _block('timm Twins', _TIMM + 'twins.Block', Argument('size')),
    # The outer block, over patches; what runs within each patch stays as it is.
    BlockFamily(
        'timm TNT',
        _TIMM + 'tnt.Block',
        FromPatchEmbed(_read_tnt, 1, module='pixel_embed', host=_TIMM + 'tnt.TNT'),
        'norm_mlp',
        ffn='mlp',
        attention_norm='norm_out',
        attention='attn_out',
        skip='norm_out',
        stream=1,
        rows=lambda block: {
            'q': ('attn_out.qk.weight', 0, block.attn_out.qk.out_features // 2, 1),
            'k': ('attn_out.qk.weight', block.attn_out.qk.out_features // 2, block.attn_out.qk.out_features, 1),
            'v': ('attn_out.v.weight', 0, block.attn_out.v.out_features, 1),
            'o': ('attn_out.proj.weight', 0, block.attn_out.proj.out_features, 1),
        },
    ),
    *(
        _block(f'timm MaxViT{suffix}', f'{_TIMM}maxxvit.{name}', FromShape(), channels_first=first, rows=_maxvit_rows)
        for suffix, name, first in (
            ('', 'PartitionAttentionCl', ()),
            (' channels first', 'PartitionAttention2d', ('', 'norm1', 'norm2', 'mlp', 'drop_path1', 'drop_path2')),
        )
    ),
    _block(
        'timm CoAtNet',
        _TIMM + 'maxxvit.TransformerBlock2d',
        FromShape(),
        channels_first=('', 'norm1', 'norm2', 'mlp', 'drop_path1', 'drop_path2'),
        reshapes=lambda block: not isinstance(block.shortcut, nn.Identity),
        rows=_maxvit_rows,
    ),
    _block(
        'timm Hiera',
        _TIMM + 'hiera.HieraBlock',
        FromPatchEmbed(_read_hiera, 0, module='unroll', host=_TIMM + 'hiera.Hiera'),
        reshapes=lambda block: block.do_expand,
        order=_hiera_order,
    ),
]
