"""What a file of another program holds, by the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[str, Tensor]


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
_EMBEDDING = r'(?:(?:embeddings?\.)?(?:patch_embed(?:ding)?s?1?|conv1)\b|stages\.0\.patch_embeddings\.)'
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
    names, chain = list(names), ''
    while True:
        inner = [n[len(chain) :] for n in names if n.startswith(chain)]
        if any(re.match(_EMBEDDING, n) for n in inner):
            return chain
        below = r'(?:\w+\.){0,3}?' + _EMBEDDING
        tower = next((t for t in _TOWERS if any(re.match(re.escape(t) + below, n) for n in inner)), None)
        if tower is None:
            return chain
        chain += tower


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
        ForeignBackboneError: The backbone is unknown, or some of its tensors are.
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


def prefixes(tensors: State) -> list[str]:
    """The blocks' prefixes, in order."""
    found = {m[0] for n in tensors if (m := re.match(r'(?:stages\.\d+\.)?blocks\.\d+\.', n))}
    return sorted(found, key=lambda p: [int(x) for x in re.findall(r'\d+', p)])


def _join_projections(found: Recognised) -> None:
    """Bring q, k and v, and the two halves of a gated FFN, together. A bias that a map has not is zero."""
    c = found.tensors
    for p in prefixes(c):
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
    for p in prefixes(c):
        if p + 'inner_norm.weight' in c and found.family != 'MiT':
            for kind in ('weight', 'bias'):
                c[p + f'attn_norm.{kind}'] = c.pop(p + f'inner_norm.{kind}')
