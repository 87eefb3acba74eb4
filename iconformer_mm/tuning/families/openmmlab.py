"""Families of MMPretrain, MMDetection, MMSegmentation and MMPose."""

from __future__ import annotations

from functools import partial
from math import ceil
from typing import Any

from .base import Argument, BlockFamily, FromBlock, FromPatchEmbed, FromShape, FromSquare, NoGrid, Rows, Size


def _read_resolution(patch_embed: Any, inputs: tuple, output: Any) -> Size:
    """The patch embedding returns ``(tokens, (height, width))``."""
    height, width = output[1]
    return int(height), int(width)


def _read_map(convolution: Any, inputs: tuple, output: Any) -> Size:
    """A convolution returns a map (B, d, H, W)."""
    return int(output.shape[2]), int(output.shape[3])


def _read_patches(patch_embed: Any, inputs: tuple, output: Any) -> Size:
    """HiViT: patches of the image, whatever the patch embedding returns."""
    height, width = inputs[0].shape[-2:]
    return height // patch_embed.patch_size[0], width // patch_embed.patch_size[1]


def _read_mobilevit(block: Any, inputs: tuple, output: Any) -> Size:
    """MobileViT: patches of the map that the block around the Transformer reads, which it enlarges to whole ones."""
    height, width = inputs[0].shape[-2:]
    return ceil(height / block.patch_size[0]), ceil(width / block.patch_size[1])


def _read_pixels(pixel_embed: Any, inputs: tuple, output: Any) -> Size:
    """TNT: a patch is what the pixel embedding unfolds."""
    height, width = pixel_embed.img_size
    stride, pixels = pixel_embed.proj.stride, pixel_embed.new_patch_size
    return height // (stride[0] * pixels[0]), width // (stride[1] * pixels[1])


def head_by_head(weight: str, heads: int, query: int, value: int) -> Rows:
    """Rows of q, k and v in one weight that lie head by head; q and k are of one size."""
    return {
        'q': (weight, 0, query, heads),
        'k': (weight, query, 2 * query, heads),
        'v': (weight, 2 * query, 2 * query + value, heads),
    }


def _tinyvit_rows(block: Any) -> Rows:
    attention = block.attn
    value = attention.qkv.out_features // attention.num_heads - 2 * attention.key_dim
    return head_by_head('attn.qkv.weight', attention.num_heads, attention.key_dim, value)


def _efficientformer_rows(block: Any) -> Rows:
    mixer = block.token_mixer
    rows = head_by_head('token_mixer.qkv.weight', mixer.num_heads, mixer.key_dim, mixer.d)
    return {**rows, 'o': ('token_mixer.proj.weight', 0, mixer.proj.out_features, 1)}


def _levit_rows(block: Any) -> Rows:
    attention = block.block
    rows = head_by_head('block.qkv.linear.weight', attention.num_heads, attention.key_dim, attention.d)
    return {**rows, 'o': ('block.proj.1.linear.weight', 0, attention.proj[1].linear.out_features, 1)}


def _mvit_grid_after(block: Any, size: Size) -> Size:
    pool = block.pool_skip
    if pool is None:
        return size
    height, width = ((side + 2 * pool.padding - pool.kernel_size) // pool.stride + 1 for side in size)
    return height, width


def _count_queries(host: Any) -> int:
    return int(host.query_embed.shape[1])


# The side adapter network of SAN has mask queries before the patches.
_SAN = FromPatchEmbed(_read_resolution, _count_queries, host='mmseg.models.decode_heads.san_head.SideAdapterNetwork')
_SEG_VIT = (_SAN, FromPatchEmbed(_read_resolution, 'with_cls_token'))
_SEG_BEIT = FromPatchEmbed(_read_resolution, 1)
_MMPRETRAIN = 'mmpretrain.models.backbones.'
_MMDET = 'mmdet.models.backbones.'
_MMSEG = 'mmseg.models.backbones.'
_MMPOSE = 'mmpose.models.backbones.'
_MM_VIT = FromPatchEmbed(_read_resolution, 'num_extra_tokens')
# MMPretrain's ViT block stands in other hosts, too.
_VIT_HOSTS = (
    FromPatchEmbed(_read_map, 'with_cls_token', module='trans_patch_conv', host=_MMPRETRAIN + 'conformer.Conformer'),
    FromPatchEmbed(_read_mobilevit, 0, module='', host=_MMPRETRAIN + 'mobilevit.MobileVitBlock', before=True),
    _MM_VIT,
)

# Blocks whose attention and FFN add the residual stream themselves (``identity``).
_identity = partial(BlockFamily, norm='norm2', attention='attn', attention_out='attn', ffn_out='ffn')
# Blocks with one DropPath for all branches.
_shared = partial(BlockFamily, norm='norm2', shared_out='drop_path')
_swin = partial(_identity, grid=Argument('hw_shape'))

OPENMMLAB: list[BlockFamily] = [
    _identity(
        'mmpretrain ViT',
        _MMPRETRAIN + 'vision_transformer.TransformerEncoderLayer',
        _VIT_HOSTS,
        norm='ln2',
        attention_norm='ln1',
        takes_prompts=True,
    ),
    # DeiT III normalises the FFN's input by ln1 as well; its ln2 is never called.
    _identity(
        'mmpretrain DeiT III',
        _MMPRETRAIN + 'deit3.DeiT3TransformerEncoderLayer',
        _MM_VIT,
        norm='ln1',
        attention_norm='ln1',
        takes_prompts=True,
        idle=('ln2',),
    ),
    _shared(
        'mmpretrain BEiT', _MMPRETRAIN + 'beit.BEiTTransformerEncoderLayer', _MM_VIT, norm='ln2', attention_norm='ln1'
    ),
    _shared('mmpretrain EVA-02', _MMPRETRAIN + 'vit_eva02.EVA02EndcoderLayer', _MM_VIT, ffn='mlp'),
    # Attention runs on windows of LN1(x), and nothing follows that sees the whole map.
    BlockFamily(
        'mmpretrain ViT-SAM',
        _MMPRETRAIN + 'vit_sam.TransformerEncoderLayer',
        FromShape(),
        'ln2',
        attention_norm='ln1',
        ffn_out='ffn',
    ),
    _swin('mmpretrain Swin', _MMPRETRAIN + 'swin_transformer.SwinBlock'),
    BlockFamily(
        'mmpretrain SwinV2',
        _MMPRETRAIN + 'swin_transformer_v2.SwinBlockV2',
        Argument('hw_shape'),
        None,
        attention_norm=None,
        attention_out='norm1',
        ffn_out='norm2',
    ),
    _identity(
        'mmpretrain T2T-ViT',
        _MMPRETRAIN + 't2t_vit.T2TTransformerLayer',
        FromPatchEmbed(
            _read_resolution, 'num_extra_tokens', module='tokens_to_token', host=_MMPRETRAIN + 't2t_vit.T2T_ViT'
        ),
        norm='ln2',
        attention_norm='ln1',
        takes_prompts=True,
        where=lambda block: not block.v_shortcut,  # those that make the tokens have no sum with attention
    ),
    _shared('mmpretrain Twins', _MMPRETRAIN + 'twins.LSAEncoderLayer', Argument('hw_shape')),
    _shared('mmpretrain Twins global', _MMPRETRAIN + 'twins.GSAEncoderLayer', Argument('hw_shape')),
    # A convolution (local patch interaction) stands between attention and the FFN.
    _shared('mmpretrain XCiT', _MMPRETRAIN + 'xcit.XCABlock', Argument('H', width='W'), direct=False),
    # The norms of attention and FFN lie within them, and attention runs on windows.
    _shared(
        'mmpretrain TinyViT',
        _MMPRETRAIN + 'tinyvit.TinyViTBlock',
        FromBlock(lambda block: block.img_size),
        norm=None,
        ffn='mlp',
        attention_norm=None,
        direct=False,
        rows=_tinyvit_rows,
    ),
    _shared(
        'mmpretrain MViT',
        _MMPRETRAIN + 'mvit.MultiScaleBlock',
        Argument('in_size'),
        ffn='mlp',
        reshapes=lambda block: block.pool_skip is not None or block.proj is not None,
        grid_after=_mvit_grid_after,
        where=lambda block: block.proj is None or block.dim_mul_in_attention,
    ),
    _shared(
        'mmpretrain HiViT',
        _MMPRETRAIN + 'hivit.BlockWithRPE',
        FromPatchEmbed(_read_patches, 0),
        ffn='mlp',
        where=lambda block: block.attn is not None,
    ),
    BlockFamily(
        'mmpretrain HiViT early',
        _MMPRETRAIN + 'hivit.BlockWithRPE',
        NoGrid('its early blocks keep the pixels of each patch apart'),
        'norm2',
        ffn='mlp',
        attention_norm=None,
        ffn_out='drop_path',
        branches=('ffn',),
        where=lambda block: block.attn is None,
    ),
    *(
        _identity(
            f'mmpretrain DaViT {kind}',
            f'{_MMPRETRAIN}davit.{kind.capitalize()}Block',
            Argument('hw_shape'),
            direct=False,
            skip='norm1',
        )
        for kind in ('spatial', 'channel')
    ),
    BlockFamily(
        'mmpretrain LeViT attention',
        _MMPRETRAIN + 'levit.Residual',
        FromSquare(),
        None,
        ffn='block',
        attention_norm=None,
        attention_out='drop_path',
        branches=('attention',),
        direct=False,
        rows=_levit_rows,
        where=lambda block: hasattr(block.block, 'qkv'),
    ),
    BlockFamily(
        'mmpretrain LeViT FFN',
        _MMPRETRAIN + 'levit.Residual',
        FromSquare(),
        None,
        ffn='block',
        attention_norm=None,
        ffn_out='drop_path',
        branches=('ffn',),
        where=lambda block: not hasattr(block.block, 'qkv'),
    ),
    # The FFN's branch begins at the sum with attention, and is added to the block's input.
    _shared(
        'mmpretrain EdgeNeXt',
        _MMPRETRAIN + 'edgenext.SDTAEncoder',
        FromShape(),
        norm='norm',
        ffn='pointwise_conv1',
        attention_norm='norm_csa',
        attention='csa',
        direct=False,
        skip='norm_csa',
        channels_first=('', 'drop_path'),
        rows=lambda block: {
            'fc1': ('pointwise_conv1.weight', 0, block.pointwise_conv1.weight.shape[0], 1),
            'fc2': ('pointwise_conv2.weight', 0, block.pointwise_conv2.weight.shape[0], 1),
        },
    ),
    _shared(
        'mmpretrain EfficientFormer',
        _MMPRETRAIN + 'efficientformer.Meta3D',
        FromSquare(),
        ffn='mlp',
        attention='token_mixer',
        rows=_efficientformer_rows,
        where=lambda block: hasattr(block.token_mixer, 'qkv'),
    ),
    _shared(
        'mmpretrain EfficientFormer pooling',
        _MMPRETRAIN + 'efficientformer.Meta4D',
        FromShape(),
        norm=None,
        ffn='mlp',
        attention_norm=None,
        branches=('ffn',),
        direct=False,
        channels_first=('', 'mlp', 'drop_path'),
    ),
    BlockFamily(
        'mmpretrain MixMIM',
        _MMPRETRAIN + 'mixmim.MixMIMBlock',
        FromBlock(lambda block: block.input_resolution),
        'ln2',
        attention_norm='ln1',
        attention_out='drop_path',
        ffn_out='ffn',
    ),
    # The outer block, over patches; what runs within each patch stays as it is.
    BlockFamily(
        'mmpretrain TNT',
        _MMPRETRAIN + 'tnt.TnTLayer',
        FromPatchEmbed(_read_pixels, 1, module='pixel_embed', host=_MMPRETRAIN + 'tnt.TNT'),
        'outer_block.norm_ffn',
        ffn='outer_block.ffn',
        attention_norm='outer_block.norm_attn',
        attention='outer_block.attn',
        attention_out='outer_block.attn',
        ffn_out='outer_block.ffn',
        skip='outer_block.norm_attn',
        stream=1,
        rows=lambda block: {
            **{
                role: ('outer_block.attn.attn.in_proj_weight', i * width, (i + 1) * width, 1)
                for width in [block.outer_block.attn.embed_dims]
                for i, role in enumerate('qkv')
            },
            'o': ('outer_block.attn.attn.out_proj.weight', 0, block.outer_block.attn.embed_dims, 1),
        },
    ),
    # What mixes tokens is pooling or a shift, which has no place for an adapter of attention.
    *(
        _shared(
            f'mmpretrain {name}',
            f'{_MMPRETRAIN}{name.lower()}.{name}Block',
            FromShape(),
            ffn='mlp',
            attention_norm=None,
            branches=('ffn',),
            channels_first=('', 'norm2', 'mlp', 'drop_path'),
        )
        for name in ('PoolFormer', 'RIFormer')
    ),
    _swin('mmdet Swin', _MMDET + 'swin.SwinBlock'),
    _swin('mmdet PVT', _MMDET + 'pvt.PVTEncoderLayer'),
    _swin('mmseg Swin', _MMSEG + 'swin.SwinBlock'),
    _identity('mmseg ViT', _MMSEG + 'vit.TransformerEncoderLayer', _SEG_VIT, takes_prompts=True),
    # MAE's block is a BEiT block.
    _shared('mmseg BEiT', _MMSEG + 'beit.BEiTTransformerEncoderLayer', _SEG_BEIT),
    _swin('mmseg MiT', _MMSEG + 'mit.TransformerEncoderLayer'),
    _shared('mmseg Twins', _MMSEG + 'twins.LSAEncoderLayer', Argument('hw_shape')),
    _shared('mmseg Twins global', _MMSEG + 'twins.GSAEncoderLayer', Argument('hw_shape')),
    _swin('mmpose Swin', _MMPOSE + 'swin.SwinBlock'),
    _swin('mmpose PVT', _MMPOSE + 'pvt.PVTEncoderLayer'),
    _shared('mmpose HRFormer', _MMPOSE + 'hrformer.HRFormerBlock', FromShape(), channels_first=('',)),
]
