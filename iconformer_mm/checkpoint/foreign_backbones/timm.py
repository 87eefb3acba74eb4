"""Backbones in the names of timm."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from .pieces import Pieces, fuse_gate, num_prefix, sam_facts, split_bias, swin_facts, vit_facts
from .recognition import ForeignBackboneError, prefixes

# timm's names by family and width. Other sizes are given as model_kwargs of the first.
_TIMM_NAMES: dict[str, dict[int, str]] = {
    'DINOv2': {
        384: 'vit_small_patch14_dinov2',
        768: 'vit_base_patch14_dinov2',
        1024: 'vit_large_patch14_dinov2',
        1536: 'vit_giant_patch14_dinov2',
    },
    'DINOv3': {
        384: 'vit_small_patch16_dinov3',
        768: 'vit_base_patch16_dinov3',
        1024: 'vit_large_patch16_dinov3',
        1280: 'vit_huge_plus_patch16_dinov3',
        4096: 'vit_7b_patch16_dinov3',
    },
    'ViT': {
        192: 'vit_tiny_patch16_224',
        384: 'vit_small_patch16_224',
        768: 'vit_base_patch16_224',
        1024: 'vit_large_patch16_224',
        1280: 'vit_huge_patch14_224',
    },
    'CLIP': {768: 'vit_base_patch16_clip_quickgelu_224', 1024: 'vit_large_patch14_clip_quickgelu_224'},
    'SigLIP': {
        768: 'vit_base_patch16_siglip_224',
        1024: 'vit_large_patch16_siglip_256',
        1152: 'vit_so400m_patch14_siglip_224',
    },
    'BEiT': {768: 'beitv2_base_patch16_224', 1024: 'beitv2_large_patch16_224'},
    'EVA-02': {
        192: 'eva02_tiny_patch14_224',
        384: 'eva02_small_patch14_224',
        768: 'eva02_base_patch14_224',
        1024: 'eva02_large_patch14_224',
    },
    'SAM': {768: 'samvit_base_patch16', 1024: 'samvit_large_patch16', 1280: 'samvit_huge_patch16'},
    'Swin': {
        96: 'swin_tiny_patch4_window7_224',
        128: 'swin_base_patch4_window7_224',
        192: 'swin_large_patch4_window7_224',
    },
    'SwinV2': {96: 'swinv2_tiny_window8_256', 128: 'swinv2_base_window8_256', 192: 'swinv2_large_window12_192'},
}
_TIMM_NAMES['MAE'] = _TIMM_NAMES['ViT']
_DISTILLED = {
    192: 'deit_tiny_distilled_patch16_224',
    384: 'deit_small_distilled_patch16_224',
    768: 'deit_base_distilled_patch16_224',
}


def timm_vit(x: Pieces) -> dict[str, Any]:
    """Timm's ViT, Eva, BEiT and SAM, by :class:`~iconformer_mm.models.timm_features.TIMMFeatures`."""
    family = x.found.family
    shared = family == 'BEiT' and x.has('shared_table')
    facts = sam_facts(x) if family == 'SAM' else vit_facts(x, num_prefix(x))
    width, names = facts['width'], _TIMM_NAMES[family]
    name = names.get(width, next(iter(names.values())))
    kwargs: dict[str, Any] = {}
    if x.has('dist'):
        name = _DISTILLED.get(width, _DISTILLED[192])
    gated = x.has('blocks.0.gate.weight')
    if family == 'DINOv2' and gated:
        name = names[1536]
    if family == 'EVA-02' and width not in names and x.has('blocks.0.mlp_norm.weight'):
        name = names[768]  # the larger two have a norm in the FFN, and maps of q, k and v apart
    if family == 'DINOv3' and gated and width not in (1280, 4096):
        name = 'vit_small_plus_patch16_dinov3'
    if family == 'DINOv3' and x.has('blocks.0.qkv.bias') and width != 4096:
        name = _settle_dinov3_bias(x, name)
    if x.has('reg') and family == 'DINOv2':
        name = name.replace('patch14_', f'patch14_reg{x.shape("reg")[1]}_')
        if not _is_known(name):
            name = re.sub(r'reg\d+', 'reg4', name)
            kwargs['reg_tokens'] = x.shape('reg')[1]
        pos, cls = x.take('pos'), x.take('cls')
        x.rest['cls'], x.rest['pos'] = cls + pos[:, :1], pos[:, 1:]  # timm adds no position to the tokens
    if family == 'SigLIP':
        kwargs['act_layer'] = 'gelu_tanh'  # as it was trained; timm's name has the exact function
    if family in ('BEiT', 'EVA-02') and x.has('norm.weight'):
        kwargs['global_pool'] = 'token'  # timm normalises the mean otherwise
    if family == 'DINOv3':
        kwargs['num_reg_tokens'] = x.shape('reg')[1] if x.has('reg') else 0
    kwargs.update(_timm_size(name, facts, x))
    for token, target in (('cls', 'cls_token'), ('dist', 'dist_token'), ('reg', 'reg_token'), ('pos', 'pos_embed')):
        if x.has(token):
            x.move(token, target)
    x.both('patch', 'patch_embed.proj')
    if x.has('pre_norm.weight'):
        x.both('pre_norm', 'norm_pre')
    if shared:
        kwargs['use_shared_rel_pos_bias'], kwargs['use_rel_pos_bias'] = True, False
        x.move('shared_table', 'rel_pos_bias.relative_position_bias_table')
    eva = family in ('EVA-02', 'DINOv3', 'BEiT')
    packed = type(_meta(name).blocks[0].mlp).__name__ == 'GluMlp'
    for i in range(facts['depth']):
        p = f'blocks.{i}.'
        x.both(p + 'norm1', p + 'norm1')
        x.both(p + 'norm2', p + 'norm2')
        if family == 'EVA-02' and _splits_qkv(name):
            _separate_qkv(x, p)
        elif eva:
            split_bias(x, p, p + 'attn.')
        else:
            x.both(p + 'qkv', p + 'attn.qkv')
        x.both(p + 'proj', p + 'attn.proj')
        for own, theirs in (('attn_norm', 'attn.norm'), ('mlp_norm', 'mlp.norm')):
            if x.has(p + own + '.weight'):
                x.both(p + own, p + theirs)
        for number in '12':
            if x.has(p + f'gamma_{number}'):
                x.move(p + f'gamma_{number}', p + (f'gamma_{number}' if eva else f'ls{number}.gamma'))
        for axis in 'hw':
            if family == 'SAM':
                x.move(p + f'rel_pos_{axis}', p + f'attn.rel_pos_{axis}')
        if p + 'table' in x.rest:
            x.move(p + 'table', p + 'attn.relative_position_bias_table')
        if gated and packed:
            fuse_gate(x, p, p + 'mlp.fc1')
        elif gated:
            x.both(p + 'gate', p + 'mlp.fc1_g')
            x.both(p + 'value', p + 'mlp.fc1_x')
        else:
            x.both(p + 'fc1', p + 'mlp.fc1')
        x.both(p + 'fc2', p + 'mlp.fc2')
    if x.has('norm.weight'):
        x.both('norm', 'norm')
    if x.has('fc_norm.weight'):
        x.both('fc_norm', 'fc_norm')
    for i in range(4) if family == 'SAM' and x.has('neck.0.weight') else ():
        x.both(f'neck.{i}', f'neck.{i}')
    _timm_pool(x)
    return dict(type='TIMMFeatures', model_name=name, model_kwargs=kwargs)


def _settle_dinov3_bias(x: Pieces, name: str) -> str:
    """The name with or without biases of q and v. Those of the larger distilled models are zero, and timm has none."""
    names = [f'{p}qkv.bias' for p in prefixes(x.found.tensors)]
    if any(x.rest[n].any() for n in names):
        return f'{name}_qkvb'
    for n in names:
        x.take(n)
    return name


def _separate_qkv(x: Pieces, p: str) -> None:
    q, k, v = x.take(p + 'qkv.weight').chunk(3)
    for letter, part in zip('qkv', (q, k, v)):
        x.out[f'{p}attn.{letter}_proj.weight'] = part.clone()
    if x.has(p + 'qkv.bias'):
        q, k, v = x.take(p + 'qkv.bias').chunk(3)
        if k.any():
            raise ForeignBackboneError(f"{p}k has a bias, which timm's EVA-02 has not")
        x.out[f'{p}attn.q_proj.bias'], x.out[f'{p}attn.v_proj.bias'] = q.clone(), v.clone()


def _timm_pool(x: Pieces) -> None:
    """SigLIP's attention pooling, which TIMMFeatures leaves out and timm's classifier has."""
    for name in [n for n in x.rest if n.startswith('pool.')]:
        x.move(name, 'attn_' + name)
    if not x.has('hf_pool.probe'):
        return
    x.move('hf_pool.probe', 'attn_pool.latent')
    for kind in ('weight', 'bias'):
        q, k, v = x.take(f'hf_pool.attention.in_proj_{kind}').chunk(3)
        x.out[f'attn_pool.q.{kind}'], x.out[f'attn_pool.kv.{kind}'] = q.clone(), torch.cat([k, v])
    x.both('hf_pool.attention.out_proj', 'attn_pool.proj')
    x.both('hf_pool.layernorm', 'attn_pool.norm')
    x.both('hf_pool.mlp.fc1', 'attn_pool.mlp.fc1')
    x.both('hf_pool.mlp.fc2', 'attn_pool.mlp.fc2')


def timm_swin(x: Pieces) -> dict[str, Any]:
    """Timm's Swin and SwinV2."""
    facts = swin_facts(x)
    names, second = _TIMM_NAMES[x.found.family], x.found.family == 'SwinV2'
    name = names.get(facts['width'], names[96])
    if facts['width'] == 96 and facts['depths'] == [2, 2, 18, 2]:
        name = name.replace('tiny', 'small')
    kwargs: dict[str, Any] = {}
    if facts.get('window', 7) == 12:
        name = name.replace('window7_224', 'window12_384') if 'tiny' not in name and 'small' not in name else name
    model = _meta(name)
    if facts['width'] not in names or [len(layer.blocks) for layer in model.layers] != facts['depths']:
        kwargs = dict(embed_dim=facts['width'], depths=facts['depths'], num_heads=facts['heads'])
    if not second and f'window{facts["window"]}_' not in name:
        kwargs['window_size'] = facts['window']
    x.both('patch', 'patch_embed.proj')
    x.both('patch_norm', 'patch_embed.norm')
    for p in prefixes(x.found.tensors):
        b = p.replace('stages.', 'layers.')
        x.both(p + 'norm1', b + 'norm1')
        x.both(p + 'norm2', b + 'norm2')
        if second:
            split_bias(x, p, b + 'attn.')
            x.move(p + 'logit_scale', b + 'attn.logit_scale')
            x.both(p + 'cpb.0', b + 'attn.cpb_mlp.0')
            x.both(p + 'cpb.2', b + 'attn.cpb_mlp.2')
        else:
            x.both(p + 'qkv', b + 'attn.qkv')
            x.move(p + 'table', b + 'attn.relative_position_bias_table')
        x.both(p + 'proj', b + 'attn.proj')
        x.both(p + 'fc1', b + 'mlp.fc1')
        x.both(p + 'fc2', b + 'mlp.fc2')
    for stage in range(len(facts['depths']) - 1):
        x.both(f'stages.{stage}.merge.norm', f'layers.{stage + 1}.downsample.norm')
        x.both(f'stages.{stage}.merge.reduction', f'layers.{stage + 1}.downsample.reduction')
    x.both('norm', 'norm')
    return dict(type='TIMMFeatures', model_name=name, model_kwargs=kwargs)


def _meta(name: str, **kwargs: Any) -> Any:
    """A timm model without memory."""
    try:
        import timm
    except ImportError as error:
        raise ForeignBackboneError('converting to timm needs timm: pip install iconformer_mm[timm]') from error
    with torch.device('meta'):
        return timm.create_model(name, **kwargs)


def _is_known(name: str) -> bool:
    import timm

    return timm.is_model(name)


def _splits_qkv(name: str) -> bool:
    return getattr(_meta(name).blocks[0].attn, 'qkv', None) is None


def _timm_size(name: str, facts: dict[str, Any], x: Pieces) -> dict[str, Any]:
    """The arguments in which a model differs from the one that timm has under a name."""
    model = _meta(name)
    kwargs: dict[str, Any] = {}
    if model.embed_dim != facts['width']:
        kwargs.update(embed_dim=facts['width'], num_heads=facts['heads'])
    if len(model.blocks) != facts['depth']:
        kwargs['depth'] = facts['depth']
    if model.patch_embed.patch_size[0] != facts['patch']:
        kwargs['patch_size'] = facts['patch']
    mlp = model.blocks[0].mlp
    hidden = mlp.fc2.in_features
    if hidden * facts['width'] != facts['hidden'] * model.embed_dim:
        # timm's gated FFN of DINOv2 counts both halves.
        wanted = facts['hidden'] * (2 if x.found.family == 'DINOv2' and type(mlp).__name__ == 'GluMlp' else 1)
        ratio = wanted / facts['width']
        kwargs['mlp_ratio'] = ratio if int(facts['width'] * ratio) == wanted else math.nextafter(ratio, math.inf)
    if x.found.family == 'SAM':
        if model.pos_embed.shape[1] != x.shape('pos')[1]:
            kwargs['img_size'] = facts['image']
        if facts['window'] != 14:
            kwargs['window_size'] = facts['window']
        if tuple(i for i, b in enumerate(model.blocks) if not b.window_size) != tuple(facts['whole']):
            kwargs['global_attn_indexes'] = tuple(facts['whole'])
        if facts['out'] != 256:
            kwargs['neck_chans'] = facts['out']
        return kwargs
    image = facts.get('image')
    if x.found.family == 'BEiT':
        table = next((n for n in ('shared_table', 'blocks.0.table') if x.has(n)), None)
        assert table is not None
        image = (math.isqrt(x.shape(table)[0] - 3) + 1) // 2 * facts['patch']
        if 'num_heads' in kwargs:
            kwargs['num_heads'] = x.shape(table)[1]
    if image and image != model.patch_embed.img_size[0]:
        kwargs['img_size'] = image
    return kwargs
