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
    Family('DeiT distilled', _mmpretrain('DistilledVisionTransformer', arch=VIT, img_size=64), 2),
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
