"""Backbones in the names of MMPretrain, MMSegmentation and MMDetection."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .pieces import Pieces, arch_of, fuse_gate, num_prefix, sam_facts, split_bias, swin_facts, vit_facts
from .recognition import ForeignBackboneError, prefixes


def _norms_and_ffn(x: Pieces, a: str, b: str, norms: tuple[str, str] = ('ln1', 'ln2')) -> None:
    """The two norms and mmcv's FFN of a block, which nearly all classes share."""
    x.both(a + 'norm1', b + norms[0])
    x.both(a + 'norm2', b + norms[1])
    x.both(a + 'fc1', b + 'ffn.layers.0.0')
    x.both(a + 'fc2', b + 'ffn.layers.1')


def _whole_ratio(x: Pieces, facts: dict[str, Any]) -> int:
    """Width of mmseg's FFN as a multiple of the model's.

    Raises:
        ForeignBackboneError: It is no whole multiple, and the class takes no other.
    """
    if facts['hidden'] % facts['width']:
        raise ForeignBackboneError(
            f'the FFN of this {x.found.family} is {facts["hidden"]} wide, no whole multiple of {facts["width"]}, and '
            "mmseg's class takes no other; convert it --to timm"
        )
    return facts['hidden'] // facts['width']


def mmpretrain_vit(x: Pieces) -> dict[str, Any]:
    """``mmpretrain.VisionTransformer`` and its distilled variant."""
    if x.has('reg'):
        raise ForeignBackboneError(
            f"this {x.found.family} has register tokens, which mmpretrain's VisionTransformer has not; "
            'convert it --to timm'
        )
    facts = vit_facts(x, num_prefix(x))
    config: dict[str, Any] = dict(
        type='mmpretrain.VisionTransformer',
        arch=arch_of(facts),
        img_size=facts['image'],
        patch_size=facts['patch'],
    )
    if x.has('dist'):
        config['type'] = 'mmpretrain.DistilledVisionTransformer'
        x.move('dist', 'dist_token')
    if x.has('cls'):
        x.move('cls', 'cls_token')
    else:
        config.update(with_cls_token=False, out_type='featmap')
    x.move('pos', 'pos_embed')
    x.both('patch', 'patch_embed.projection')
    layer: dict[str, Any] = {}
    if x.has('pre_norm.weight'):
        x.both('pre_norm', 'pre_norm')
        config['pre_norm'] = True
    if x.found.family == 'CLIP':
        config['norm_cfg'] = dict(type='LN', eps=1e-5)
        layer['act_cfg'] = dict(type='mmpretrain.QuickGELU')
    if x.found.family == 'SigLIP':
        layer['act_cfg'] = dict(type='GELU', approximate='tanh')
    if x.has('blocks.0.gamma_1'):
        config['layer_scale_init_value'] = 1e-5
    gated = x.has('blocks.0.gate.weight')
    if gated:
        layer['ffn_type'] = 'swiglu_fused'
        config['arch']['feedforward_channels'] = facts['hidden'] * 3 // 2
    if layer:
        config['layer_cfgs'] = layer
    for i in range(facts['depth']):
        a, b = f'blocks.{i}.', f'layers.{i}.'
        x.both(a + 'qkv', b + 'attn.qkv')
        x.both(a + 'proj', b + 'attn.proj')
        if x.has(a + 'gamma_1'):
            x.move(a + 'gamma_1', b + 'attn.gamma1.weight')
            x.move(a + 'gamma_2', b + 'ffn.gamma2.weight')
        if gated:
            x.both(a + 'norm1', b + 'ln1')
            x.both(a + 'norm2', b + 'ln2')
            fuse_gate(x, a, b + 'ffn.w12')
            x.both(a + 'fc2', b + 'ffn.w3')
        else:
            _norms_and_ffn(x, a, b)
    x.both('norm', 'ln1')
    return config


def mmseg_vit(x: Pieces) -> dict[str, Any]:
    """``mmseg.VisionTransformer``, which has no layer scale: it is folded into the maps before it."""
    for name, what in (
        ('reg', 'register tokens'),
        ('dist', 'a distillation token'),
        ('blocks.0.gate.weight', 'a gated FFN'),
    ):
        if x.has(name):
            raise ForeignBackboneError(
                f"this {x.found.family} has {what}, which mmseg's VisionTransformer has not; convert it --to timm"
            )
    facts = vit_facts(x, 1)
    config = dict(
        type='mmseg.VisionTransformer',
        img_size=facts['image'],
        patch_size=facts['patch'],
        patch_bias=x.has('patch.bias'),
        embed_dims=facts['width'],
        num_layers=facts['depth'],
        num_heads=facts['heads'],
        mlp_ratio=_whole_ratio(x, facts),
        norm_cfg=dict(type='LN', eps=1e-6),
        interpolate_mode='bicubic',
        final_norm=True,
    )
    x.move('cls', 'cls_token')
    x.move('pos', 'pos_embed')
    x.both('patch', 'patch_embed.projection')
    for i in range(facts['depth']):
        a, b = f'blocks.{i}.', f'layers.{i}.'
        _norms_and_ffn(x, a, b)
        x.move(a + 'qkv.weight', b + 'attn.attn.in_proj_weight')
        x.move(a + 'qkv.bias', b + 'attn.attn.in_proj_bias')
        x.both(a + 'proj', b + 'attn.attn.out_proj')
        for gamma, layer in (('gamma_1', 'attn.attn.out_proj'), ('gamma_2', 'ffn.layers.1')):
            if x.has(a + gamma):
                scale = x.take(a + gamma)
                x.out[f'{b}{layer}.weight'] = x.out[f'{b}{layer}.weight'] * scale[:, None]
                x.out[f'{b}{layer}.bias'] = x.out[f'{b}{layer}.bias'] * scale
    x.both('norm', 'ln1')
    return config


def _spread_table(x: Pieces) -> bool:
    """Give every block a shared table of relative positions; whether it was shared."""
    if not x.has('shared_table'):
        return False
    table = x.take('shared_table')
    for i in range(x.depth()):
        x.rest[f'blocks.{i}.table'] = table.clone()
    return True


def mm_beit(library: str) -> Callable[[Pieces], dict[str, Any]]:
    """``mmpretrain.BEiTViT`` and ``mmseg.BEiT``."""

    def write(x: Pieces) -> dict[str, Any]:
        _spread_table(x)
        if x.has('pos'):
            raise ForeignBackboneError(
                'this BEiT has absolute positions, too, which the class has not; convert it --to timm'
            )
        facts = vit_facts(x, 1)
        rows, heads = x.rest['blocks.0.table'].shape
        side = (math.isqrt(rows - 3) + 1) // 2
        arch = arch_of({**facts, 'heads': heads})
        size = dict(img_size=side * facts['patch'], patch_size=facts['patch'])
        # Of the classifier of the mean, the norm behind the mean stands for the final norm.
        norm = 'fc_norm' if x.has('fc_norm.weight') and not x.has('norm.weight') else 'norm'
        if library == 'mmpretrain':
            pooled = dict(out_type='avg_featmap') if norm == 'fc_norm' else {}
            config = dict(type='mmpretrain.BEiTViT', arch=arch, **size, **pooled)
            if norm == 'fc_norm':
                x.both('fc_norm', 'ln2')
                config['final_norm'] = False
            elif x.has('norm.weight'):
                x.both('norm', 'ln1')
                config.update(final_norm=True, out_type='cls_token')
            else:
                config.update(final_norm=False, out_type='featmap')
        else:
            config = dict(
                type='mmseg.BEiT',
                **size,
                embed_dims=arch['embed_dims'],
                num_layers=arch['num_layers'],
                num_heads=heads,
                mlp_ratio=_whole_ratio(x, facts),
                qv_bias=True,
                init_values=0.1,
                norm_cfg=dict(type='LN', eps=1e-6),
            )
            if x.has('norm.weight'):
                config['final_norm'] = True
                x.both('norm', 'ln1')
        x.move('cls', 'cls_token')
        x.both('patch', 'patch_embed.projection')
        for i in range(facts['depth']):
            a, b = f'blocks.{i}.', f'layers.{i}.'
            _norms_and_ffn(x, a, b)
            x.move(a + 'gamma_1', b + 'gamma_1')
            x.move(a + 'gamma_2', b + 'gamma_2')
            x.move(a + 'table', b + 'attn.relative_position_bias_table')
            split_bias(x, a, b + 'attn.')
            x.both(a + 'proj', b + 'attn.proj')
        return config

    return write


def mmpretrain_sam(x: Pieces) -> dict[str, Any]:
    """``mmpretrain.ViTSAM``."""
    facts = sam_facts(x)
    config = dict(
        type='mmpretrain.ViTSAM',
        arch=dict(arch_of(facts), global_attn_indexes=facts['whole']),
        img_size=facts['image'],
        patch_size=facts['patch'],
        window_size=facts['window'],
        out_channels=facts['out'],
    )
    x.move('pos', 'pos_embed')
    x.both('patch', 'patch_embed.projection')
    for i in range(facts['depth']):
        a, b = f'blocks.{i}.', f'layers.{i}.'
        _norms_and_ffn(x, a, b)
        x.both(a + 'qkv', b + 'attn.qkv')
        x.both(a + 'proj', b + 'attn.proj')
        x.move(a + 'rel_pos_h', b + 'attn.rel_pos_h')
        x.move(a + 'rel_pos_w', b + 'attn.rel_pos_w')
    for i in range(4) if facts['out'] else ():
        x.both(f'neck.{i}', f'channel_reduction.{i}')
    return config


def _unfold_order(reduction: Tensor) -> Tensor:
    """Columns of a patch merge: from (column, row) of the patch before channels to channels before (row, column)."""
    out, inside = reduction.shape
    parts = reduction.reshape(out, 2, 2, inside // 4)  # (column, row) and channels
    return parts.permute(0, 3, 2, 1).reshape(out, inside)


def _unfold_norm(values: Tensor) -> Tensor:
    return _unfold_order(values[None])[0]


def mm_swin(library: str) -> Callable[[Pieces], dict[str, Any]]:
    """The Swin of the three libraries, and mmpretrain's SwinTransformerV2."""

    def write(x: Pieces) -> dict[str, Any]:
        facts = swin_facts(x)
        second = x.found.family == 'SwinV2'
        last = len(facts['depths']) - 1
        config: dict[str, Any]
        if library == 'mmpretrain':
            arch = dict(embed_dims=facts['width'], depths=facts['depths'], num_heads=facts['heads'])
            if second:
                arch['extra_norm_every_n_blocks'] = 0
                config = dict(type='mmpretrain.SwinTransformerV2', arch=arch, patch_size=facts['patch'])
            else:
                config = dict(
                    type='mmpretrain.SwinTransformer', arch=arch, window_size=facts['window'], patch_size=facts['patch']
                )
            config['pad_small_map'] = True
        else:
            config = dict(
                type=f'{library}.SwinTransformer',
                embed_dims=facts['width'],
                depths=facts['depths'],
                num_heads=facts['heads'],
                window_size=facts['window'],
                patch_size=facts['patch'],
                out_indices=(last,),
            )
        x.both('patch', 'patch_embed.projection')
        x.both('patch_norm', 'patch_embed.norm')
        for p in prefixes(x.found.tensors):
            b = p + 'attn.w_msa.'
            _norms_and_ffn(x, p, p, ('norm1', 'norm2'))
            if second:
                split_bias(x, p, b)
                x.move(p + 'logit_scale', b + 'logit_scale')
                x.both(p + 'cpb.0', b + 'cpb_mlp.0')
                x.both(p + 'cpb.2', b + 'cpb_mlp.2')
            else:
                x.both(p + 'qkv', b + 'qkv')
                x.move(p + 'table', b + 'relative_position_bias_table')
            x.both(p + 'proj', b + 'proj')
        for stage in range(last):
            a = f'stages.{stage}.merge.'
            # In the second version of mmpretrain the merge opens the next stage; its norm follows the reduction.
            b = f'stages.{stage + 1 if second else stage}.downsample.'
            x.out[b + 'reduction.weight'] = _unfold_order(x.take(a + 'reduction.weight'))
            for kind in ('weight', 'bias'):
                value = x.take(a + f'norm.{kind}')
                x.out[b + f'norm.{kind}'] = value if second else _unfold_norm(value)
        x.both('norm', f'norm{last}')
        return config

    return write


def mmseg_mit(x: Pieces) -> dict[str, Any]:
    """``mmseg.MixVisionTransformer``."""
    depths = x.depths()
    stages = range(len(depths))
    widths = [x.shape(f'stages.{s}.patch.weight')[0] for s in stages]
    ratios = [x.shape(p)[2] if (p := f'stages.{s}.blocks.0.sr.weight') in x.found.tensors else 1 for s in stages]
    config = dict(
        type='mmseg.MixVisionTransformer',
        embed_dims=widths[0],
        num_stages=len(depths),
        num_layers=depths,
        num_heads=[w // widths[0] for w in widths],  # 32 channels a head in B0, 64 in the others
        patch_sizes=[x.shape(f'stages.{s}.patch.weight')[2] for s in stages],
        sr_ratios=ratios,
        out_indices=tuple(stages),
        mlp_ratio=x.shape('stages.0.blocks.0.fc1.weight')[0] // widths[0],
        qkv_bias=x.has('stages.0.blocks.0.qkv.bias'),
    )
    for s in stages:
        x.both(f'stages.{s}.patch', f'layers.{s}.0.projection')
        x.both(f'stages.{s}.patch_norm', f'layers.{s}.0.norm')
        x.both(f'stages.{s}.norm', f'layers.{s}.2')
        for i in range(depths[s]):
            a, b = f'stages.{s}.blocks.{i}.', f'layers.{s}.1.{i}.'
            x.both(a + 'norm1', b + 'norm1')
            x.both(a + 'norm2', b + 'norm2')
            x.move(a + 'qkv.weight', b + 'attn.attn.in_proj_weight')
            if config['qkv_bias']:
                x.move(a + 'qkv.bias', b + 'attn.attn.in_proj_bias')
            x.both(a + 'proj', b + 'attn.attn.out_proj')
            if ratios[s] > 1:
                x.both(a + 'sr', b + 'attn.sr')
                x.both(a + 'inner_norm', b + 'attn.norm')
            for name, layer in (('fc1', '0'), ('fc2', '4')):  # 1 x 1 convolutions there
                x.both(a + name, f'{b}ffn.layers.{layer}')
                x.out[f'{b}ffn.layers.{layer}.weight'] = x.out[f'{b}ffn.layers.{layer}.weight'][:, :, None, None]
            x.both(a + 'dwconv', b + 'ffn.layers.1')
    return config
