"""One tiny model for each block family, for tests that hold for all of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

VIT = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
SWIN = dict(embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])


def _library(library: str, name: str, **arguments) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(import_module(f'{library}.models.backbones'), name)(**copy.deepcopy(arguments))

    return build


_mmpretrain = partial(_library, 'mmpretrain')


@dataclass(frozen=True)
class Family:
    """A tiny backbone.

    Attributes:
        name: Name of the case.
        build: Makes it.
        num_blocks: Its number of blocks.
        sizes: Input sizes (height, width) it takes, the first a square.
        build_with_cp: Makes its twin with gradient checkpointing, if there is one.
    """

    name: str
    build: Callable[[], nn.Module]
    num_blocks: int
    sizes: tuple[tuple[int, int], ...] = ((64, 64), (48, 80))
    build_with_cp: Callable[[], nn.Module] | None = None

    @property
    def stride(self) -> int | None:
        """Pixels a token; None for a pyramid."""
        if any(word in self.name for word in ('Swin', 'PVT', 'MiT', 'Twins')):
            return None
        return 14 if 'DINOv2' in self.name else 16

    def __str__(self) -> str:
        return self.name


def _swin(name: str, with_cp: bool, **arguments) -> Callable[[], nn.Module]:
    arch = {**SWIN, 'extra_norm_every_n_blocks': 0} if name.endswith('V2') else SWIN
    return _mmpretrain(name, arch=arch, img_size=64, with_cp=with_cp, pad_small_map=True, **arguments)


def _timm(name: str, grad_checkpointing: bool = False, **arguments) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        backbone = _mmpretrain('TIMMBackbone', model_name=name, **arguments)()
        backbone.timm_model.set_grad_checkpointing(grad_checkpointing)
        return backbone

    return build


_TIMM_VIT = dict(img_size=64, embed_dim=32, depth=2, num_heads=2, dynamic_img_size=True)
_TIMM_SWIN = dict(img_size=64, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=2)

FAMILIES = [
    Family('ViT', _mmpretrain('VisionTransformer', arch=VIT, img_size=64, out_type='raw'), 2),
    Family(
        'ViT layer scale',
        _mmpretrain('VisionTransformer', arch=VIT, img_size=64, out_type='raw', layer_scale_init_value=0.5),
        2,
    ),
    Family(
        'ViT no class token',
        _mmpretrain('VisionTransformer', arch=VIT, img_size=64, with_cls_token=False, out_type='raw'),
        2,
    ),
    Family('DeiT distilled', _mmpretrain('DistilledVisionTransformer', arch=VIT, img_size=64, out_type='raw'), 2),
    Family('DeiT III', _mmpretrain('DeiT3', arch=VIT, img_size=64, out_type='raw'), 2),
    Family('BEiT', _mmpretrain('BEiTViT', arch=VIT, img_size=64, out_type='raw'), 2, sizes=((64, 64),)),
    Family('EVA-02', _mmpretrain('ViTEVA02', arch=VIT, img_size=64, out_type='raw'), 2),
    Family(
        'ViT-SAM',
        _mmpretrain(
            'ViTSAM',
            arch={**VIT, 'global_attn_indexes': [1]},
            img_size=64,
            patch_size=16,
            out_channels=16,
            window_size=3,
        ),
        2,
    ),
    Family('Swin', _swin('SwinTransformer', False), 5, ((64, 64), (61, 90)), _swin('SwinTransformer', True)),
    Family(
        'SwinV2',
        _swin('SwinTransformerV2', False, window_size=[4, 4, 2, 2]),
        5,
        ((64, 64), (64, 96)),
        _swin('SwinTransformerV2', True, window_size=[4, 4, 2, 2]),
    ),
    Family(
        'timm ViT',
        _timm('vit_tiny_patch16_224', **_TIMM_VIT),
        2,
        build_with_cp=_timm('vit_tiny_patch16_224', True, **_TIMM_VIT),
    ),
    Family(
        'timm DINOv2 with registers',
        _timm('vit_small_patch14_reg4_dinov2', **{**_TIMM_VIT, 'img_size': 56}),
        2,
        ((56, 56), (42, 70)),
        _timm('vit_small_patch14_reg4_dinov2', True, **{**_TIMM_VIT, 'img_size': 56}),
    ),
    Family(
        'timm Swin',
        _timm('swin_tiny_patch4_window7_224', **_TIMM_SWIN),
        5,
        ((64, 64),),
        _timm('swin_tiny_patch4_window7_224', True, **_TIMM_SWIN),
    ),
    Family(
        'timm SwinV2 features',
        _timm('swinv2_tiny_window8_256', features_only=True, **_TIMM_SWIN),
        5,
        ((64, 64),),
    ),
]

_MM_SWIN = dict(embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])
_SEG_VIT = dict(img_size=64, embed_dims=32, num_layers=2, num_heads=2, mlp_ratio=2, out_indices=(0, 1))
_MIT = dict(embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])
_PVT = dict(embed_dims=8, num_layers=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], init_cfg=None)
_TWINS = dict(
    embed_dims=[16, 32, 64, 128],
    num_heads=[1, 2, 4, 8],
    mlp_ratios=[2, 2, 2, 2],
    depths=[1, 1, 1, 1],
    sr_ratios=[8, 4, 2, 1],
    norm_after_stage=False,
)
_SEG_TIMM = dict(model_name='swin_tiny_patch4_window7_224', features_only=True, pretrained=False, **_TIMM_SWIN)
_ODD = ((64, 64), (61, 90))

FAMILIES += [
    Family(
        f'{library} Swin',
        _library(library, 'SwinTransformer', **_MM_SWIN),
        5,
        _ODD,
        _library(library, 'SwinTransformer', with_cp=True, **_MM_SWIN),
    )
    for library in ('mmdet', 'mmseg')
] + [
    Family('mmdet PVT', _library('mmdet', 'PyramidVisionTransformer', pretrain_img_size=64, **_PVT), 4, _ODD),
    Family('mmdet PVTv2', _library('mmdet', 'PyramidVisionTransformerV2', **_PVT), 4, _ODD),
    Family(
        'mmseg ViT',
        _library('mmseg', 'VisionTransformer', **_SEG_VIT),
        2,
        ((64, 64), (61, 90)),
        _library('mmseg', 'VisionTransformer', with_cp=True, **_SEG_VIT),
    ),
    Family('mmseg ViT no class token', _library('mmseg', 'VisionTransformer', with_cls_token=False, **_SEG_VIT), 2),
    Family('mmseg BEiT', _library('mmseg', 'BEiT', init_values=0.5, **_SEG_VIT), 2, ((64, 64),)),
    Family('mmseg MAE', _library('mmseg', 'MAE', init_values=0.5, **_SEG_VIT), 2, ((64, 64),)),
    Family(
        'mmseg MiT',
        _library('mmseg', 'MixVisionTransformer', **_MIT),
        4,
        _ODD,
        _library('mmseg', 'MixVisionTransformer', with_cp=True, **_MIT),
    ),
    Family('mmseg Twins', _library('mmseg', 'SVT', windiow_sizes=[4, 4, 2, 2], **_TWINS), 4, ((64, 64), (96, 64))),
    Family('mmseg Twins PCPVT', _library('mmseg', 'PCPVT', **_TWINS), 4, ((64, 64), (96, 64))),
    Family('mmseg timm Swin', _library('mmseg', 'TIMMBackbone', **_SEG_TIMM), 5, ((64, 64),)),
]


def flatten(outputs) -> list[Tensor]:
    """All tensors of a (nested) output."""
    if isinstance(outputs, Tensor):
        return [outputs]
    return [tensor for output in outputs for tensor in flatten(output)]


def image(size: tuple[int, int], batch: int = 2, channels: int = 3, seed: int = 0) -> Tensor:
    """A batch of noise."""
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def stir(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give all adapter parameters values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'adapter' in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def _timm_model(name: str, **arguments) -> Callable[[], nn.Module]:
    """A timm model as timm makes it, without its classifier."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(name, num_classes=0, **{'global_pool': '', **copy.deepcopy(arguments)})

    return build


_PLAIN = dict(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2)
_DYNAMIC = dict(_PLAIN, dynamic_img_size=True)
_SMALL = ((64, 64),)
_FREE = ((64, 64), (96, 160))
_MAXVIT = dict(img_size=64, depths=(1, 1), embed_dim=(32, 64), stem_width=8)
_COATNET = dict(img_size=64, depths=(1, 1, 2, 1), embed_dim=(8, 32, 32, 64), stem_width=8)
_PYRAMID = dict(depths=(1, 1, 1, 1), embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4))
_TWINS_SMALL = dict(_PYRAMID, img_size=64, depths=(2, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))
_CROSSVIT = dict(
    global_pool='token',
    img_size=64,
    img_scale=(1.0, 0.75),
    patch_size=(8, 16),
    embed_dim=(16, 32),
    depth=[[1, 1, 0]] * 2,
)

_MM_ARCH = dict(embed_dims=16, num_heads=[1, 2, 4, 8])
_PCPVT = dict(
    embed_dims=[8, 16, 24, 32],
    depths=[1, 1, 1, 1],
    num_heads=[1, 2, 3, 4],
    patch_sizes=[4, 2, 2, 2],
    strides=[4, 2, 2, 2],
    mlp_ratios=[2, 2, 2, 2],
    sr_ratios=[4, 2, 2, 1],
)
_POOLING = dict(layers=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32], mlp_ratios=[2, 2, 2, 2], layer_scale_init_value=0.1)


def _mvitv2(**arguments) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

        cfg = MultiScaleVitCfg(depths=(1, 2, 1), embed_dim=16, num_heads=1, **arguments)
        return MultiScaleVit(cfg, img_size=(64, 64), num_classes=0, global_pool='')

    return build


def _levit() -> nn.Module:
    from mmpretrain.models.backbones import LeViT

    class TinyLeViT(LeViT):  # whose own check of a dict names keys that it does not read
        arch_zoo = {'tiny': dict(embed_dims=[16, 32, 32], num_heads=[2, 2, 2], depths=[2, 1, 1], key_dims=[8, 8, 8])}

    return TinyLeViT('tiny', img_size=128)


# One for each further kind of block; tests of what is special to families run on them.
MORE_FAMILIES = [
    Family('timm EVA-02', _timm_model('eva02_tiny_patch14_224', **_DYNAMIC), 2),
    Family('timm EVA-02 large', _timm_model('eva02_large_patch14_224', **_DYNAMIC), 2),
    Family('timm DINOv3', _timm_model('vit_small_patch16_dinov3', **_DYNAMIC), 2),
    Family('timm DINOv3 SwiGLU', _timm_model('vit_small_plus_patch16_dinov3', **_DYNAMIC), 2),
    Family('timm PE', _timm_model('vit_pe_spatial_tiny_patch16_512', **_DYNAMIC), 2),
    Family('timm EVA post-norm', _timm_model('eva02_tiny_patch14_224', use_post_norm=True, **_DYNAMIC), 2),
    Family('timm BEiT', _timm_model('beit_base_patch16_224', **_PLAIN), 2, _SMALL),
    Family('timm BEiTv2', _timm_model('beitv2_base_patch16_224', **_PLAIN), 2, _SMALL),
    Family(
        'timm SAM',
        _timm_model('samvit_base_patch16', **_PLAIN, window_size=3, global_attn_indexes=(1,), neck_chans=16),
        2,
    ),
    Family('timm ViT relative', _timm_model('vit_relpos_small_patch16_224', **_PLAIN), 2, _SMALL),
    Family('timm ViT relative post-norm', _timm_model('vit_srelpos_small_patch16_224', **_PLAIN), 2, _SMALL),
    Family('timm ViT post-norm', _timm_model('vit_base_patch16_rpn_224', **_DYNAMIC), 2),
    Family('timm ViT parallel', _timm_model('vit_base_patch16_xp_224', **_DYNAMIC), 2),
    Family('timm ViT differential', _timm_model('vit_dpwee_patch16_reg1_gap_256', **_DYNAMIC), 2),
    Family('timm NaFlexViT', _timm_model('naflexvit_base_patch16_gap', embed_dim=32, depth=2, num_heads=2), 2, _FREE),
    Family(
        'timm Hiera', _timm_model('hiera_tiny_224', img_size=(64, 64), embed_dim=16, stages=(1, 1, 2, 1)), 5, _SMALL
    ),
    Family('timm CaiT', _timm_model('cait_xxs24_224', **_PLAIN, depth_token_only=1), 2, _SMALL),
    Family('timm XCiT', _timm_model('xcit_nano_12_p16_224', **_PLAIN, cls_attn_layers=1), 2, _FREE),
    Family(
        'timm PiT',
        _timm_model('pit_ti_224', img_size=64, base_dims=(8, 8, 8), depth=(1, 1, 1), heads=(1, 2, 4)),
        3,
        _SMALL,
    ),
    Family('timm DaViT', _timm_model('davit_tiny', depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4)), 4, _FREE),
    Family(
        'timm TinyViT',
        _timm_model(
            'tiny_vit_5m_224', depths=(1, 1, 2), embed_dims=(16, 16, 32), num_heads=(2, 2, 4), window_sizes=(7, 7, 3)
        ),
        3,
        _FREE,
    ),
    Family('timm MViTv2', _mvitv2(use_cls_token=False), 4, _SMALL),
    Family('timm MViTv2 class token', _mvitv2(use_cls_token=True), 4, _SMALL),
    Family('timm PVTv2', _timm_model('pvt_v2_b0', **_PYRAMID), 4, _FREE),
    Family('timm PVTv2 linear', _timm_model('pvt_v2_b2_li', **_PYRAMID), 4, _FREE),
    Family('timm Twins PCPVT', _timm_model('twins_pcpvt_small', **_TWINS_SMALL), 5, _FREE),
    Family('timm Twins SVT', _timm_model('twins_svt_small', **_TWINS_SMALL), 5, _FREE),
    Family(
        'timm TNT',
        _timm_model('tnt_s_patch16_224', img_size=64, embed_dim=32, inner_dim=8, depth=2, num_heads_outer=2),
        2,
        _SMALL,
    ),
    Family('timm MaxViT', _timm_model('maxvit_tiny_tf_224', **_MAXVIT), 4, _SMALL),
    Family('timm MaxViT channels first', _timm_model('maxvit_rmlp_pico_rw_256', **_MAXVIT), 4, _SMALL),
    Family('timm CoAtNet', _timm_model('coatnet_0_rw_224', **_COATNET), 3, _SMALL),
    Family('timm CrossViT', _timm_model('crossvit_9_240', **_CROSSVIT), 4, _SMALL),
    Family(
        'T2T-ViT',
        _mmpretrain(
            'T2T_ViT',
            img_size=64,
            embed_dims=32,
            num_layers=2,
            out_type='raw',
            t2t_cfg=dict(token_dims=16),
            layer_cfgs=dict(num_heads=2, feedforward_channels=64),
        ),
        2,
        _FREE,
    ),
    Family(
        'XCiT',
        _mmpretrain('XCiT', patch_size=16, embed_dims=32, depth=2, num_heads=2, cls_attn_layers=1, out_type='raw'),
        2,
        _FREE,
    ),
    Family(
        'TinyViT',
        _mmpretrain(
            'TinyViT',
            arch=dict(channels=[16, 16, 32, 32], num_heads=[2, 2, 4, 4], depths=[1, 1, 2, 1]),
            img_size=(64, 64),
            window_size=[7, 7, 3, 2],
            gap_before_final_norm=False,
        ),
        4,
        _SMALL,
    ),
    Family(
        'MViT',
        _mmpretrain('MViT', arch=dict(embed_dims=16, num_layers=4, num_heads=1, downscale_indices=[1, 2]), img_size=64),
        4,
        _FREE,
    ),
    Family(
        'HiViT',
        _mmpretrain(
            'HiViT',
            arch=dict(embed_dims=32, depths=[1, 1, 7], num_heads=2),
            img_size=64,
            rpe=True,
            ape=False,
        ),
        11,
        _SMALL,
    ),
    Family('Twins PCPVT', _mmpretrain('PCPVT', arch=_PCPVT, norm_after_stage=True), 4, _FREE),
    Family(
        'Twins SVT', _mmpretrain('SVT', arch=dict(_PCPVT, window_sizes=[4, 4, 2, 2]), norm_after_stage=True), 4, _FREE
    ),
    Family(
        'DaViT', _mmpretrain('DaViT', arch=dict(_MM_ARCH, depths=[1] * 4), window_size=3, pad_small_map=True), 8, _FREE
    ),
    Family(
        'Conformer',
        _mmpretrain('Conformer', arch=dict(embed_dims=32, channel_ratio=1, num_heads=2, depths=12), base_channels=32),
        12,
        _SMALL,
    ),
    Family(
        'MobileViT',
        _mmpretrain(
            'MobileViT',
            arch=[['mobilenetv2', 8, 2, 1, 2], ['mobilevit', 16, 2, 32, 64, 2, 2], ['mobilevit', 24, 2, 32, 64, 1, 2]],
            stem_channels=8,
            out_indices=(1, 2),
        ),
        3,
        _FREE,
    ),
    Family('LeViT', _levit, 10, ((128, 128),)),
    Family(
        'EdgeNeXt',
        _mmpretrain(
            'EdgeNeXt',
            arch=dict(channels=[8, 16, 24, 32], depths=[1, 2, 2, 2], num_heads=[2, 2, 2, 2]),
            out_indices=(1, 2, 3),
            gap_before_final_norm=False,
        ),
        3,
        _FREE,
    ),
    Family(
        'EfficientFormer',
        _mmpretrain(
            'EfficientFormer',
            arch=dict(
                layers=[1, 1, 1, 2], embed_dims=[8, 16, 24, 32], downsamples=[False, True, True, True], vit_num=1
            ),
        ),
        5,
        ((224, 224),),
    ),
    Family(
        'MixMIM',
        _mmpretrain(
            'MixMIMTransformer',
            arch=dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
            img_size=64,
            window_size=[2, 2, 2, 2],
        ),
        4,
        _SMALL,
    ),
    Family(
        'TNT',
        _mmpretrain(
            'TNT',
            arch=dict(embed_dims_outer=32, embed_dims_inner=8, num_layers=2, num_heads_outer=2, num_heads_inner=2),
            img_size=64,
        ),
        2,
        _SMALL,
    ),
    Family('PoolFormer', _mmpretrain('PoolFormer', arch=_POOLING, out_indices=(2, 6)), 4, _FREE),
    Family('RIFormer', _mmpretrain('RIFormer', arch=_POOLING, out_indices=(2, 6)), 4, _FREE),
]
