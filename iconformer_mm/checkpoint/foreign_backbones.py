"""Pre-trained backbones of other programs, in the names of the mm libraries and of timm.

A file goes through one common set of names. :func:`recognise` brings its tensors there and says what
they are, by the names alone. A writer for each target then takes them all. What a target has no place for
is named, or is an error where the result would compute something else.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .onnx_reading import read_onnx
from .reading import read_checkpoint, state_dict_of

State = dict[str, Tensor]
TARGETS = ('mmpretrain', 'mmseg', 'mmdet', 'timm')


class ForeignBackboneError(ValueError):
    """A backbone of another program cannot be taken over."""


@dataclass
class Recognised:
    """A backbone in the common names.

    Attributes:
        family: What it is, e.g. ``'DINOv2'``.
        source: Whose names the file had: ``'original'`` (timm's, too, where it kept them) or ``'Hugging Face'``.
        tensors: Its tensors by common name.
        left: Tensors of the file that are no part of it, with the reason.
    """

    family: str
    source: str
    tensors: State
    left: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ConvertedBackbone:
    """A backbone in the names of a target.

    Attributes:
        family: What it is.
        source: Whose names the file had.
        config: Config of the class that it fits, key for key.
        tensors: Its tensors by the names of that class.
        left: Tensors of the file that are not used, with the reason.
        notes: What the user should know of the result.
    """

    family: str
    source: str
    config: dict[str, Any]
    tensors: State
    left: dict[str, str]
    notes: list[str]


# Reading

# Where a file holds more than the encoder, its names begin with one of these; the longer ones first.
_TOWERS = (
    'visual.trunk.',
    'visual.',
    'vision_model.',
    'vision_encoder.',
    'image_encoder.',
    'dinov2_with_registers.',
    'dinov2.',
    'dinov3_vit.',
    'segformer.',
    'swinv2.',
    'swin.',
    'beit.',
    'deit.',
    'vit.',
    'teacher.',
    'backbone.',
    'module.',
    'model.',
    'encoder.',
)
_EMBEDDING = r'(?:embeddings?\.)?(?:patch_embed(?:ding)?s?1?|conv1)\b|stages\.0\.patch_embeddings\.'
_WB = r'\.(weight|bias)'
# Names outside of the blocks, and the common ones; of a plain ViT.
_OUTER: list[tuple[str, str]] = [
    (r'(?:embeddings\.)?(?:patch_embed(?:ding)?s?|conv1)(?:\.proj(?:ection)?)?' + _WB, r'patch.\1'),
    (r'(?:embeddings\.|patch_embed\.)norm' + _WB, r'patch_norm.\1'),
    (r'(?:embeddings\.)?(?:cls_token|class_embedding)', 'cls'),
    (r'(?:embeddings\.)?(?:dist_token|distillation_token)', 'dist'),
    (r'(?:embeddings\.)?(?:register_tokens|storage_tokens|reg_token)', 'reg'),
    (
        r'(?:embeddings\.)?(?:pos_embed|position_embeddings|position_embedding\.weight|positional_embedding)',
        'pos',
    ),
    (r'(?:pre_layrnorm|ln_pre|norm_pre)' + _WB, r'pre_norm.\1'),
    (r'(?:norm|layernorm|encoder\.layernorm|post_layernorm|ln_post)' + _WB, r'norm.\1'),
    (r'(?:fc_norm|pooler\.layernorm)' + _WB, r'fc_norm.\1'),
    (r'(?:encoder\.relative_position_bias|rel_pos_bias)\.relative_position_bias_table', 'shared_table'),
    (r'neck\.(?:0|conv1)\.weight', 'neck.0.weight'),
    (r'neck\.(?:1|layer_norm1)' + _WB, r'neck.1.\1'),
    (r'neck\.(?:2|conv2)\.weight', 'neck.2.weight'),
    (r'neck\.(?:3|layer_norm2)' + _WB, r'neck.3.\1'),
    (r'attn_pool\.(.+)', r'pool.\1'),
    (
        r'head\.(probe|attention\.in_proj_(?:weight|bias)|(?:attention\.out_proj|layernorm|mlp\.fc[12])\.\w+)',
        r'hf_pool.\1',
    ),
]
_ATTENTION = r'(?:attention\.attention|attention\.self|attention|self_attn|attn)'
# Names within a block.
_INNER: list[tuple[str, str]] = [
    (r'(?:norm1|ln1|ln_1|layernorm_before|layer_norm1|layer_norm_1)' + _WB, r'norm1.\1'),
    (r'(?:norm2|ln2|ln_2|layernorm_after|layer_norm2|layer_norm_2)' + _WB, r'norm2.\1'),
    (_ATTENTION + r'\.(q|k|v)(?:_proj|uery|ey|alue)?' + _WB, r'\1.\2'),
    (_ATTENTION + r'\.(q|v)_bias', r'\1.bias'),
    (_ATTENTION + r'\.kv' + _WB, r'kv.\1'),
    (_ATTENTION + r'\.(?:qkv\.|in_proj_)(weight|bias)', r'qkv.\1'),
    (r'(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj|attn\.out_proj|attn\.proj)' + _WB, r'proj.\1'),
    (r'(?:attn\.inner_attn_ln)' + _WB, r'attn_norm.\1'),
    (r'(?:ls1\.gamma|gamma_1|lambda_1|layer_scale1\.lambda1)', 'gamma_1'),
    (r'(?:ls2\.gamma|gamma_2|lambda_2|layer_scale2\.lambda1)', 'gamma_2'),
    (r'(?:mlp\.fc1_g|mlp\.w1|mlp\.gate_proj)' + _WB, r'gate.\1'),
    (r'(?:mlp\.fc1_x|mlp\.w2)' + _WB, r'value.\1'),
    (r'(?:mlp\.w12|mlp\.weights_in)' + _WB, r'gate_value.\1'),
    (r'(?:mlp\.norm|mlp\.ffn_ln)' + _WB, r'mlp_norm.\1'),
    (r'(?:mlp\.fc1|intermediate\.dense|mlp\.c_fc|mlp\.up_proj|mlp\.lin1|mlp\.dense1)' + _WB, r'fc1.\1'),
    (
        r'(?:mlp\.fc2|output\.dense|mlp\.c_proj|mlp\.down_proj|mlp\.lin2|mlp\.dense2|mlp\.w3|mlp\.weights_out)' + _WB,
        r'fc2.\1',
    ),
    (r'mlp\.dwconv\.dwconv' + _WB, r'dwconv.\1'),
    (
        r'(?:attn\.sr|attention\.self\.sr|attention\.sequence_reduction\.sequence_reduction)' + _WB,
        r'sr.\1',
    ),
    (
        r'(?:attn\.norm|attention\.self\.layer_norm|attention\.sequence_reduction\.layer_norm)' + _WB,
        r'inner_norm.\1',
    ),
    (_ATTENTION + r'\.(?:relative_position_bias\.)?relative_position_bias_table', 'table'),
    (r'attn\.(rel_pos_[hw])', r'\1'),
    (_ATTENTION + r'\.logit_scale', 'logit_scale'),
    (_ATTENTION + r'\.(?:cpb_mlp|continuous_position_bias_mlp)\.(0|2)' + _WB, r'cpb.\1.\2'),
    (r'attn\.qkv\.bias_mask', 'bias_mask'),
]
_BLOCK = re.compile(r'(?:model\.|encoder\.|transformer\.)*(?:layers?|blocks?|resblocks)\.(?:\d+\.(?=\d))?(\d+)\.(.+)')
_STAGED_BLOCK = re.compile(r'(?:encoder\.)?layers\.(\d+)\.blocks\.(\d+)\.(.+)')
_MERGING = re.compile(r'(?:encoder\.)?layers\.(\d+)\.downsample\.((?:norm|reduction)\.\w+)')
# MiT counts its stages from 1 in the original, from 0 elsewhere.
_MIT: list[tuple[re.Pattern, str, int]] = [
    (re.compile(r'patch_embed([1-4])\.proj' + _WB), 'stages.{}.patch.{}', 1),
    (re.compile(r'patch_embed([1-4])\.norm' + _WB), 'stages.{}.patch_norm.{}', 1),
    (re.compile(r'norm([1-4])' + _WB), 'stages.{}.norm.{}', 1),
    (re.compile(r'block([1-4])\.(\d+\..+)'), 'stages.{}.blocks.{}', 1),
    (re.compile(r'(?:encoder\.)?patch_embeddings\.(\d)\.proj' + _WB), 'stages.{}.patch.{}', 0),
    (re.compile(r'(?:encoder\.)?patch_embeddings\.(\d)\.layer_norm' + _WB), 'stages.{}.patch_norm.{}', 0),
    (re.compile(r'(?:encoder\.)?layer_norm\.(\d)' + _WB), 'stages.{}.norm.{}', 0),
    (re.compile(r'(?:encoder\.)?block\.(\d)\.(\d+\..+)'), 'stages.{}.blocks.{}', 0),
    (re.compile(r'stages\.(\d)\.patch_embeddings\.proj' + _WB), 'stages.{}.patch.{}', 0),
    (re.compile(r'stages\.(\d)\.patch_embeddings\.layer_norm' + _WB), 'stages.{}.patch_norm.{}', 0),
    (re.compile(r'stages\.(\d)\.layer_norm' + _WB), 'stages.{}.norm.{}', 0),
    (re.compile(r'stages\.(\d)\.blocks\.(\d+\..+)'), 'stages.{}.blocks.{}', 0),
]
# What is no part of an encoder, or is computed.
_LEFT: list[tuple[str, str]] = [
    (r'.*relative_position_index|.*relative_coords_table|.*attn_mask', 'computed from the window size'),
    (r'.*rope.*(?:periods|freqs\w*)|.*position_ids', 'computed from the resolution'),
    (r'(?:embeddings\.)?mask_token', 'token of masked pre-training'),
    (r'decoder.*|decode_head\..*', 'decoder'),
    (
        r'(?:head|head_dist|fc|classifier|cls_classifier|distillation_classifier|lm_head|score|pooler\.dense'
        r'|logit_scale|logit_bias|visual_projection|text_projection|proj|dino_head|ibot_head|projectors'
        r'|local_cls_norm)(?:\..*)?',
        'head',
    ),
]
_HUGGING_FACE = re.compile(
    r'(?:^|\.)(?:embeddings\.|encoder\.layers?\.\d+\.|self_attn\.|attention\.(?:self|output|attention)\.)'
    r'|^layer\.\d|layer_scale1|layer_norm1|dense1'
)


def _below_tower(names: Iterable[str]) -> str:
    """The longest chain of prefixes below which an encoder lies."""
    names = list(names)
    chain = ''
    while True:
        inner = [n[len(chain) :] for n in names if n.startswith(chain)]
        tower = next((t for t in _TOWERS if any(re.match(re.escape(t) + _EMBEDDING, n) for n in inner)), None)
        deeper = next(
            (
                t
                for t in _TOWERS
                if tower is None and any(re.match(re.escape(t) + r'(?:\w+\.){1,3}?' + _EMBEDDING, n) for n in inner)
            ),
            None,
        )
        if any(re.match(_EMBEDDING, n) for n in inner) or (tower or deeper) is None:
            return chain
        chain += tower or deeper or ''


def _rename(name: str, table: list[tuple[str, str]]) -> str | None:
    """The common name by a table; None for what is not in it."""
    for pattern, common in table:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(common)
    return None


def _reason(name: str) -> str | None:
    return next((reason for pattern, reason in _LEFT if re.fullmatch(pattern, name)), None)


def _common_name(name: str, staged: bool, mit: bool) -> str | None:
    """The common name of one tensor, None for an unknown one."""
    if mit:
        for pattern, common, first in _MIT:
            match = pattern.fullmatch(name)
            if match:
                stage, rest = int(match[1]) - first, match[2]
                if '.blocks.' not in common:
                    return common.format(stage, rest)
                index, _, inner = rest.partition('.')
                renamed = _rename(inner, _INNER)
                return renamed and f'stages.{stage}.blocks.{index}.{renamed}'
        return None
    match = _MERGING.fullmatch(name)
    if match:
        return f'stages.{match[1]}.merge.{match[2]}'
    match = _STAGED_BLOCK.fullmatch(name)
    if match and staged:
        renamed = _rename(match[3], _INNER)
        return renamed and f'stages.{match[1]}.blocks.{match[2]}.{renamed}'
    match = _BLOCK.fullmatch(name)
    if match and not staged:
        renamed = _rename(match[2], _INNER)
        return renamed and f'blocks.{match[1]}.{renamed}'
    return _rename(name, _OUTER)


def recognise(state: Mapping[str, Tensor]) -> Recognised:
    """Tell by its names what a file holds, and bring it to the common names.

    Args:
        state: Tensors by name.

    Raises:
        ForeignBackboneError: It is no known backbone, or has tensors that are not known in it.
    """
    tower = _below_tower(state)
    inside = {n[len(tower) :]: n for n in state if n.startswith(tower)}
    left = {n: 'outside of the image encoder' for n in state if not n.startswith(tower)}
    staged = any(_STAGED_BLOCK.fullmatch(n) for n in inside)
    mit = any(pattern.fullmatch(n) for n in inside for pattern, *_ in _MIT[:1] + _MIT[4:5] + _MIT[8:9])
    tensors: State = {}
    origin: dict[str, str] = {}
    unknown = []
    for name, full in inside.items():
        common = _common_name(name, staged, mit)
        reason = None if common else _reason(name)
        if common in tensors:
            raise ForeignBackboneError(
                f'{origin[common]} and {full} both stand for {common}: the file holds two backbones'
            )
        if common:
            tensors[common], origin[common] = state[full], full
        elif reason:
            left[full] = reason
        else:
            unknown.append(full)
    family = _family(tensors, staged, mit, any(r == 'decoder' for r in left.values()))
    if family is None:
        some = ', '.join(list(state)[:3]) or 'nothing'
        raise ForeignBackboneError(
            f'the file is none of the known backbones ({", ".join(FAMILIES)}) by its names; it has {some}, ...'
        )
    if unknown:
        raise ForeignBackboneError(
            f'the file looks like {family}, and has {len(unknown)} tensors that are unknown there, such as '
            f'{", ".join(unknown[:3])}: it may be another variant, which cannot be converted'
        )
    source = 'Hugging Face' if any(_HUGGING_FACE.search(n) for n in inside) else 'original'
    found = Recognised(family, source, tensors, left)
    _join_projections(found)
    _settle(found)
    return found


FAMILIES = ('DINOv2', 'DINOv3', 'MAE', 'ViT', 'EVA-02', 'BEiT', 'SAM', 'CLIP', 'SigLIP', 'Swin', 'SwinV2', 'MiT')


def _family(c: State, staged: bool, mit: bool, decoder: bool) -> str | None:
    if mit:
        return 'MiT' if 'stages.0.patch.weight' in c else None
    if 'patch.weight' not in c:
        return None
    if staged:
        first = 'stages.0.blocks.0.'
        return 'SwinV2' if first + 'logit_scale' in c else 'Swin' if first + 'table' in c else None
    has = {n.removeprefix('blocks.0.') for n in c}
    if not has & {'norm1.weight'}:
        return None
    rules: list[tuple[str, bool]] = [
        ('SAM', 'rel_pos_h' in has),
        ('BEiT', 'table' in has or 'shared_table' in has),
        ('EVA-02', _is_gated(c) and 'pos' in has and 'gamma_1' not in has),
        ('DINOv3', 'pos' not in has and 'gamma_1' in has),
        ('CLIP', 'pre_norm.weight' in has and 'cls' in has),
        ('SigLIP', 'pos' in has and 'cls' not in has),
        ('DINOv2', 'gamma_1' in has and 'pos' in has),
        ('MAE', decoder and 'pos' in has),
        ('ViT', 'pos' in has),
    ]
    return next((name for name, holds in rules if holds), None)


def _is_gated(c: State) -> bool:
    """Whether the FFN of the first block is gated; timm has both halves of its first map in one ``fc1``."""
    block = 'blocks.0.'
    if block + 'gate.weight' in c or block + 'gate_value.weight' in c:
        return True
    first, second = c.get(block + 'fc1.weight'), c.get(block + 'fc2.weight')
    return first is not None and second is not None and len(first) == 2 * second.shape[1]


def looks_like(state: Mapping[str, Tensor]) -> str:
    """What a file is by its names, for messages; empty if that is not known.

    Args:
        state: Tensors by name.
    """
    try:
        found = recognise(state)
    except ForeignBackboneError:
        return ''
    article = 'an' if found.family[0] in 'AEIMS' and found.family not in ('Swin', 'SwinV2', 'SigLIP', 'MiT') else 'a'
    return f'{article} {found.family}, {_size(found)}'


def _size(found: Recognised) -> str:
    blocks = {
        n.rpartition('.blocks.')[0] + '.' + n.partition('blocks.')[2].partition('.')[0]
        for n in found.tensors
        if 'blocks.' in n
    }
    patch = found.tensors.get('patch.weight', found.tensors.get('stages.0.patch.weight'))
    assert patch is not None
    return f'{len(blocks)} blocks, {len(patch)} channels'


def _prefixes(tensors: State) -> list[str]:
    """The blocks' prefixes, in order."""
    found = {m[0] for n in tensors if (m := re.match(r'(?:stages\.\d+\.)?blocks\.\d+\.', n))}
    return sorted(found, key=lambda p: [int(x) for x in re.findall(r'\d+', p)])


def _join_projections(found: Recognised) -> None:
    """Bring q, k and v, and the two halves of a gated FFN, together. A bias that a map has not is zero."""
    c = found.tensors
    for p in _prefixes(c):
        if p + 'kv.weight' in c:
            for kind in ('weight', 'bias'):
                if p + f'kv.{kind}' in c:
                    c[p + f'k.{kind}'], c[p + f'v.{kind}'] = c.pop(p + f'kv.{kind}').chunk(2)
        if p + 'q.weight' in c:
            parts = [c.pop(p + f'{x}.weight') for x in 'qkv']
            c[p + 'qkv.weight'] = torch.cat(parts)
        biases = [c.pop(p + f'{x}.bias', None) for x in 'qkv']
        given = next((b for b in biases if b is not None), None)
        if given is not None:
            c[p + 'qkv.bias'] = torch.cat([torch.zeros_like(given) if b is None else b for b in biases])
        mask = c.pop(p + 'bias_mask', None)
        if mask is not None:  # DINOv3 keeps the bias of k at zero by a mask
            c[p + 'qkv.bias'] = torch.where(mask == 1, c[p + 'qkv.bias'], torch.zeros(()).to(c[p + 'qkv.bias']))
        for kind in ('weight', 'bias'):
            if p + f'gate_value.{kind}' in c:
                c[p + f'gate.{kind}'], c[p + f'value.{kind}'] = c.pop(p + f'gate_value.{kind}').chunk(2)
            elif p + f'fc1.{kind}' in c and len(c[p + f'fc1.{kind}']) == 2 * c[p + 'fc2.weight'].shape[1]:  # timm's
                c[p + f'gate.{kind}'], c[p + f'value.{kind}'] = c.pop(p + f'fc1.{kind}').chunk(2)
            elif p + f'gate.{kind}' in c and p + f'fc1.{kind}' in c:  # Hugging Face's up_proj
                c[p + f'value.{kind}'] = c.pop(p + f'fc1.{kind}')


def _settle(found: Recognised) -> None:
    """Give tokens and positions one shape, and merges the stage that they lead out of."""
    c = found.tensors
    width = c['patch.weight'].shape[0] if 'patch.weight' in c else 0
    for name in ('cls', 'dist'):
        if name in c:
            c[name] = c[name].reshape(1, 1, width)
    if 'reg' in c:
        c['reg'] = c['reg'].reshape(1, -1, width)
        if not c['reg'].numel():
            del c['reg']
    if 'pos' in c and found.family not in ('SAM', 'Swin', 'SwinV2'):
        c['pos'] = c['pos'].reshape(1, -1, width)
    merges = sorted({int(n.split('.')[1]) for n in c if '.merge.' in n})
    if merges and merges[0] == 1:  # timm has the merge at the head of the next stage
        for name in [n for n in c if '.merge.' in n]:
            stage, rest = name.split('.', 2)[1:]
            c[f'stages.{int(stage) - 1}.{rest}'] = c.pop(name)
        c.update({n: c.pop(n) for n in sorted(c)})
    for p in _prefixes(c):
        if p + 'inner_norm.weight' in c and found.family != 'MiT':
            for kind in ('weight', 'bias'):
                c[p + f'attn_norm.{kind}'] = c.pop(p + f'inner_norm.{kind}')


# Writing


class _Pieces:
    """Takes tensors out of the common names, and knows at the end what no one took."""

    def __init__(self, found: Recognised) -> None:
        self.found = found
        self.rest = dict(found.tensors)
        self.out: State = {}

    def has(self, name: str) -> bool:
        return name in self.rest

    def take(self, name: str) -> Tensor:
        if name not in self.rest:
            raise ForeignBackboneError(f'the file looks like {self.found.family}, and lacks {name} (common name)')
        return self.rest.pop(name)

    def move(self, name: str, target: str) -> None:
        self.out[target] = self.take(name)

    def both(self, name: str, target: str) -> None:
        """A weight and, where there is one, its bias."""
        self.move(name + '.weight', target + '.weight')
        if self.has(name + '.bias'):
            self.move(name + '.bias', target + '.bias')

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.found.tensors[name].shape)

    def depth(self) -> int:
        return len(_prefixes(self.found.tensors))

    def depths(self) -> list[int]:
        stages = [int(p.split('.')[1]) for p in _prefixes(self.found.tensors)]
        return [stages.count(s) for s in range(max(stages) + 1)]


def _grid(number: int, family: str) -> int:
    side = math.isqrt(number)
    if side * side != number:
        raise ForeignBackboneError(
            f'the positions of this {family} are {number}, no square grid; only square ones are converted'
        )
    return side


def _vit_facts(x: _Pieces, prefix: int) -> dict[str, Any]:
    """Width, depth and the like of a plain ViT."""
    width, _, patch, _ = x.shape('patch.weight')
    hidden = x.shape('blocks.0.fc2.weight')[1]
    facts = dict(width=width, patch=patch, depth=x.depth(), hidden=hidden, heads=max(width // 64, 1))
    if 'pos' in x.found.tensors:
        facts['image'] = _grid(x.shape('pos')[1] - prefix, x.found.family) * patch
    return facts


def _arch(facts: dict[str, Any]) -> dict[str, Any]:
    return dict(
        embed_dims=facts['width'],
        num_layers=facts['depth'],
        num_heads=facts['heads'],
        feedforward_channels=facts['hidden'],
    )


def _num_prefix(x: _Pieces) -> int:
    return int(x.has('cls')) + int(x.has('dist'))


def _mmpretrain_vit(x: _Pieces) -> dict[str, Any]:
    """``mmpretrain.VisionTransformer`` and its distilled variant."""
    if x.has('reg'):
        raise ForeignBackboneError(
            f"this {x.found.family} has register tokens, which mmpretrain's VisionTransformer has not; "
            'convert it --to timm'
        )
    facts = _vit_facts(x, _num_prefix(x))
    config: dict[str, Any] = dict(
        type='mmpretrain.VisionTransformer',
        arch=_arch(facts),
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
        x.both(a + 'norm1', b + 'ln1')
        x.both(a + 'norm2', b + 'ln2')
        x.both(a + 'qkv', b + 'attn.qkv')
        x.both(a + 'proj', b + 'attn.proj')
        if x.has(a + 'gamma_1'):
            x.move(a + 'gamma_1', b + 'attn.gamma1.weight')
            x.move(a + 'gamma_2', b + 'ffn.gamma2.weight')
        if gated:
            _fuse_gate(x, a, b + 'ffn.w12')
            x.both(a + 'fc2', b + 'ffn.w3')
        else:
            x.both(a + 'fc1', b + 'ffn.layers.0.0')
            x.both(a + 'fc2', b + 'ffn.layers.1')
    x.both('norm', 'ln1')
    return config


def _fuse_gate(x: _Pieces, block: str, target: str) -> None:
    for kind in ('weight', 'bias'):
        if x.has(block + f'gate.{kind}'):
            x.out[f'{target}.{kind}'] = torch.cat([x.take(block + f'gate.{kind}'), x.take(block + f'value.{kind}')])


def _mmseg_vit(x: _Pieces) -> dict[str, Any]:
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
    facts = _vit_facts(x, 1)
    config = dict(
        type='mmseg.VisionTransformer',
        img_size=facts['image'],
        patch_size=facts['patch'],
        patch_bias=x.has('patch.bias'),
        embed_dims=facts['width'],
        num_layers=facts['depth'],
        num_heads=facts['heads'],
        mlp_ratio=facts['hidden'] / facts['width'],
        norm_cfg=dict(type='LN', eps=1e-6),
        interpolate_mode='bicubic',
        final_norm=True,
    )
    config['mlp_ratio'] = int(config['mlp_ratio']) if config['mlp_ratio'].is_integer() else config['mlp_ratio']
    x.move('cls', 'cls_token')
    x.move('pos', 'pos_embed')
    x.both('patch', 'patch_embed.projection')
    for i in range(facts['depth']):
        a, b = f'blocks.{i}.', f'layers.{i}.'
        x.both(a + 'norm1', b + 'ln1')
        x.both(a + 'norm2', b + 'ln2')
        x.move(a + 'qkv.weight', b + 'attn.attn.in_proj_weight')
        x.move(a + 'qkv.bias', b + 'attn.attn.in_proj_bias')
        x.both(a + 'proj', b + 'attn.attn.out_proj')
        x.both(a + 'fc1', b + 'ffn.layers.0.0')
        x.both(a + 'fc2', b + 'ffn.layers.1')
        for gamma, layer in (('gamma_1', 'attn.attn.out_proj'), ('gamma_2', 'ffn.layers.1')):
            if x.has(a + gamma):
                scale = x.take(a + gamma)
                x.out[f'{b}{layer}.weight'] = x.out[f'{b}{layer}.weight'] * scale[:, None]
                x.out[f'{b}{layer}.bias'] = x.out[f'{b}{layer}.bias'] * scale
    x.both('norm', 'ln1')
    return config


def _spread_table(x: _Pieces) -> bool:
    """Give every block a shared table of relative positions; whether it was shared."""
    if not x.has('shared_table'):
        return False
    table = x.take('shared_table')
    for i in range(x.depth()):
        x.rest[f'blocks.{i}.table'] = table.clone()
    return True


def _mm_beit(library: str) -> Callable[[_Pieces], dict[str, Any]]:
    """``mmpretrain.BEiTViT`` and ``mmseg.BEiT``."""

    def write(x: _Pieces) -> dict[str, Any]:
        _spread_table(x)
        if x.has('pos'):
            raise ForeignBackboneError(
                'this BEiT has absolute positions, too, which the class has not; convert it --to timm'
            )
        facts = _vit_facts(x, 1)
        rows, heads = x.rest['blocks.0.table'].shape
        side = (math.isqrt(rows - 3) + 1) // 2
        arch = _arch({**facts, 'heads': heads})
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
                mlp_ratio=facts['hidden'] / facts['width'],
                qv_bias=True,
                init_values=0.1,
                norm_cfg=dict(type='LN', eps=1e-6),
            )
            config['mlp_ratio'] = int(config['mlp_ratio'])
            if x.has('norm.weight'):
                config['final_norm'] = True
                x.both('norm', 'ln1')
        x.move('cls', 'cls_token')
        x.both('patch', 'patch_embed.projection')
        for i in range(facts['depth']):
            a, b = f'blocks.{i}.', f'layers.{i}.'
            x.both(a + 'norm1', b + 'ln1')
            x.both(a + 'norm2', b + 'ln2')
            x.move(a + 'gamma_1', b + 'gamma_1')
            x.move(a + 'gamma_2', b + 'gamma_2')
            x.move(a + 'table', b + 'attn.relative_position_bias_table')
            _split_bias(x, a, b + 'attn.')
            x.both(a + 'proj', b + 'attn.proj')
            x.both(a + 'fc1', b + 'ffn.layers.0.0')
            x.both(a + 'fc2', b + 'ffn.layers.1')
        return config

    return write


def _split_bias(x: _Pieces, block: str, target: str) -> None:
    """One qkv with a bias of q and of v apart; that of k is zero."""
    x.move(block + 'qkv.weight', target + 'qkv.weight')
    if x.has(block + 'qkv.bias'):
        q, k, v = x.take(block + 'qkv.bias').chunk(3)
        if k.any():
            raise ForeignBackboneError(f'{block}k has a bias, which the class has not')
        x.out[target + 'q_bias'], x.out[target + 'v_bias'] = q.clone(), v.clone()


def _sam_facts(x: _Pieces) -> dict[str, Any]:
    width, _, patch, _ = x.shape('patch.weight')
    blocks = range(x.depth())
    sides = {i: (x.shape(f'blocks.{i}.rel_pos_h')[0] + 1) // 2 for i in blocks}
    image = x.shape('pos')[1]
    return dict(
        width=width,
        patch=patch,
        depth=len(blocks),
        heads=width // x.shape('blocks.0.rel_pos_h')[1],
        hidden=x.shape('blocks.0.fc2.weight')[1],
        image=image * patch,
        whole=[i for i in blocks if sides[i] == image],
        window=min(sides.values()),
        out=x.shape('neck.0.weight')[0] if x.has('neck.0.weight') else 0,
    )


def _mmpretrain_sam(x: _Pieces) -> dict[str, Any]:
    """``mmpretrain.ViTSAM``."""
    facts = _sam_facts(x)
    config = dict(
        type='mmpretrain.ViTSAM',
        arch=dict(_arch(facts), global_attn_indexes=facts['whole']),
        img_size=facts['image'],
        patch_size=facts['patch'],
        window_size=facts['window'],
        out_channels=facts['out'],
    )
    x.move('pos', 'pos_embed')
    x.both('patch', 'patch_embed.projection')
    for i in range(facts['depth']):
        a, b = f'blocks.{i}.', f'layers.{i}.'
        x.both(a + 'norm1', b + 'ln1')
        x.both(a + 'norm2', b + 'ln2')
        x.both(a + 'qkv', b + 'attn.qkv')
        x.both(a + 'proj', b + 'attn.proj')
        x.move(a + 'rel_pos_h', b + 'attn.rel_pos_h')
        x.move(a + 'rel_pos_w', b + 'attn.rel_pos_w')
        x.both(a + 'fc1', b + 'ffn.layers.0.0')
        x.both(a + 'fc2', b + 'ffn.layers.1')
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


def _swin_facts(x: _Pieces) -> dict[str, Any]:
    depths = x.depths()
    first = [f'stages.{s}.blocks.0.' for s in range(len(depths))]
    key = 'logit_scale' if x.found.family == 'SwinV2' else 'table'
    heads = [x.shape(p + key)[0 if key == 'logit_scale' else 1] for p in first]
    if x.has('pos'):
        raise ForeignBackboneError('this Swin has absolute positions, which cannot be converted')
    facts = dict(width=x.shape('patch.weight')[0], depths=depths, heads=heads, patch=x.shape('patch.weight')[2])
    if key == 'table':
        facts['window'] = (math.isqrt(x.shape(first[0] + 'table')[0]) + 1) // 2
    return facts


def _mm_swin(library: str) -> Callable[[_Pieces], dict[str, Any]]:
    """The Swin of the three libraries, and mmpretrain's SwinTransformerV2."""

    def write(x: _Pieces) -> dict[str, Any]:
        facts = _swin_facts(x)
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
        for p in _prefixes(x.found.tensors):
            b = p + 'attn.w_msa.'
            x.both(p + 'norm1', p + 'norm1')
            x.both(p + 'norm2', p + 'norm2')
            if second:
                _split_bias(x, p, b)
                x.move(p + 'logit_scale', b + 'logit_scale')
                x.both(p + 'cpb.0', b + 'cpb_mlp.0')
                x.both(p + 'cpb.2', b + 'cpb_mlp.2')
            else:
                x.both(p + 'qkv', b + 'qkv')
                x.move(p + 'table', b + 'relative_position_bias_table')
            x.both(p + 'proj', b + 'proj')
            x.both(p + 'fc1', p + 'ffn.layers.0.0')
            x.both(p + 'fc2', p + 'ffn.layers.1')
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


def _mmseg_mit(x: _Pieces) -> dict[str, Any]:
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
        num_heads=[max(w // widths[0], 1) if widths[0] != 64 else w // 64 for w in widths],
        patch_sizes=[x.shape(f'stages.{s}.patch.weight')[2] for s in stages],
        sr_ratios=ratios,
        out_indices=tuple(stages),
        mlp_ratio=x.shape('stages.0.blocks.0.fc1.weight')[0] // widths[0],
        qkv_bias=x.has('stages.0.blocks.0.qkv.bias'),
    )
    config['num_heads'] = [w // widths[0] for w in widths]  # MiT: 32 channels a head in B0, 64 in the others
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


def _timm_vit(x: _Pieces) -> dict[str, Any]:
    """Timm's ViT, Eva, BEiT and SAM, by :class:`~iconformer_mm.models.timm_features.TIMMFeatures`."""
    family = x.found.family
    shared = family == 'BEiT' and x.has('shared_table')
    facts = _sam_facts(x) if family == 'SAM' else _vit_facts(x, _num_prefix(x))
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
            _split_bias(x, p, p + 'attn.')
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
            _fuse_gate(x, p, p + 'mlp.fc1')
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


def _settle_dinov3_bias(x: _Pieces, name: str) -> str:
    """The name with or without biases of q and v. Those of the larger distilled models are zero, and timm has none."""
    names = [f'{p}qkv.bias' for p in _prefixes(x.found.tensors)]
    if any(x.rest[n].any() for n in names):
        return f'{name}_qkvb'
    for n in names:
        x.take(n)
    return name


def _separate_qkv(x: _Pieces, p: str) -> None:
    q, k, v = x.take(p + 'qkv.weight').chunk(3)
    for letter, part in zip('qkv', (q, k, v)):
        x.out[f'{p}attn.{letter}_proj.weight'] = part.clone()
    if x.has(p + 'qkv.bias'):
        q, k, v = x.take(p + 'qkv.bias').chunk(3)
        if k.any():
            raise ForeignBackboneError(f"{p}k has a bias, which timm's EVA-02 has not")
        x.out[f'{p}attn.q_proj.bias'], x.out[f'{p}attn.v_proj.bias'] = q.clone(), v.clone()


def _timm_pool(x: _Pieces) -> None:
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


def _timm_swin(x: _Pieces) -> dict[str, Any]:
    """Timm's Swin and SwinV2."""
    facts = _swin_facts(x)
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
    for p in _prefixes(x.found.tensors):
        b = p.replace('stages.', 'layers.')
        x.both(p + 'norm1', b + 'norm1')
        x.both(p + 'norm2', b + 'norm2')
        if second:
            _split_bias(x, p, b + 'attn.')
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


def _timm_size(name: str, facts: dict[str, Any], x: _Pieces) -> dict[str, Any]:
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


_VIT_ALSO: dict[str, Callable[[_Pieces], dict[str, Any]]] = dict(
    mmpretrain=_mmpretrain_vit, mmseg=_mmseg_vit, timm=_timm_vit
)
_WRITERS: dict[str, dict[str, Callable[[_Pieces], dict[str, Any]]]] = {
    'DINOv2': _VIT_ALSO,
    'MAE': _VIT_ALSO,
    'ViT': _VIT_ALSO,
    'DINOv3': dict(timm=_timm_vit),
    'EVA-02': dict(timm=_timm_vit),
    'BEiT': dict(mmpretrain=_mm_beit('mmpretrain'), mmseg=_mm_beit('mmseg'), timm=_timm_vit),
    'SAM': dict(mmpretrain=_mmpretrain_sam, timm=_timm_vit),
    'CLIP': dict(mmpretrain=_mmpretrain_vit, timm=_timm_vit),
    'SigLIP': dict(mmpretrain=_mmpretrain_vit, timm=_timm_vit),
    'Swin': dict(mmpretrain=_mm_swin('mmpretrain'), mmseg=_mm_swin('mmseg'), mmdet=_mm_swin('mmdet'), timm=_timm_swin),
    'SwinV2': dict(mmpretrain=_mm_swin('mmpretrain'), timm=_timm_swin),
    'MiT': dict(mmseg=_mmseg_mit),
}
# Classes that bear the name, and compute something else.
_OTHERWISE = {
    ('EVA-02', 'mmpretrain'): "ViTEVA02 has other angles of the rotary positions (mmpretrain 1.2 and onedl's 1.3.6)",
}
# What a target may have no place for without computing something else: what follows the encoder.
_BEHIND = {
    'pool': 'attention pooling',
    'hf_pool': 'attention pooling',
    'fc_norm': 'norm of the pooled tokens',
    'neck': 'neck',
}


def read_backbone(path: str | os.PathLike, trust: bool = False) -> State:
    """The tensors of a file of another program: safetensors, a checkpoint of torch, or ONNX. Nothing in it is executed.

    Args:
        path: The file.
        trust: Whether to unpickle a checkpoint that holds more than tensors and plain data. Defaults to False.

    Raises:
        DamagedFileError: It is truncated or no such file.
        UntrustedFileError: It holds more, and is not trusted.
        FileNotFoundError: There is none.
    """
    if os.fspath(path).endswith('.onnx'):
        return read_onnx(path)
    content = read_checkpoint(path, trust, advice='add --trust')
    for key in ('state_dict', 'model', 'teacher', 'model_ema', 'module'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return state_dict_of(content, path)


def convert_backbone(state: Mapping[str, Tensor], target: str) -> ConvertedBackbone:
    """Bring a backbone of another program to the names of a target.

    Args:
        state: Tensors of the file by name.
        target: ``'mmpretrain'``, ``'mmseg'``, ``'mmdet'`` or ``'timm'``.

    Returns:
        The tensors, the config of the class that they fit, and what of the file is not used.

    Raises:
        ForeignBackboneError: The backbone is not known, is a variant that the target does not compute, or the target
            has no class for it.
    """
    if target not in TARGETS:
        raise ForeignBackboneError(f"the target must be one of {', '.join(TARGETS)}, got '{target}'")
    found = recognise(state)
    writers = _WRITERS[found.family]
    if target not in writers:
        others = ' or '.join(f'--to {name}' for name in writers)
        why = _OTHERWISE.get((found.family, target))
        raise ForeignBackboneError(
            f'{target} has no class for {found.family}{f": its {why}" if why else ""}; convert it {others}. The other '
            "libraries take that backbone, too: by its scope, as in type='mmpretrain.VisionTransformer', or as "
            "type='TIMMFeatures'"
        )
    pieces = _Pieces(found)
    config = writers[target](pieces)
    left = dict(found.left)
    for name in pieces.rest:
        what = _BEHIND.get(name.partition('.')[0])
        if what is None:
            raise ForeignBackboneError(
                f'this {found.family} has {name}, which {config["type"]} has no place for: it would compute '
                'something else'
            )
        left[f'{name} (common name)'] = f'{what}, which {config["type"]} has not'
    tensors = {n: v.detach().clone().contiguous() for n, v in pieces.out.items()}
    return ConvertedBackbone(found.family, found.source, config, tensors, left, _notes(found, config))


def _notes(found: Recognised, config: dict[str, Any]) -> list[str]:
    notes = []
    if found.family == 'SwinV2':
        notes.append('the window size is in no tensor: set window_size (and img_size) to those of the pre-training')
    if config['type'] == 'mmseg.VisionTransformer' and found.family == 'DINOv2':
        notes.append('layer scale is folded into the output maps of attention and FFN, since the class has none')
    if found.family not in ('SAM', 'BEiT', 'Swin', 'SwinV2'):
        notes.append('the number of heads is in no tensor: it is taken as the width / 64, as these models have it')
    return notes
