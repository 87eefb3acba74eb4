"""Adapters trained by other programs: AdaptFormer, Mona, and the LoRA of Hugging Face's peft and of MMPretrain.

An adapter is converted only if it computes exactly the same function here. Otherwise an error says what differs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iconformer_mm.tuning.injection import find_backbone, get_injection, inject, remove
from iconformer_mm.tuning.methods.weights import ROLES, find_targets
from iconformer_mm.tuning.sites import Site, find_sites

from .safetensors_io import parse_json, shortened

State = dict[str, Tensor]


class ForeignAdapterError(ValueError):
    """An adapter of another program cannot be converted."""


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another program, converted to our names.

    Attributes:
        method: Config of our method that computes the same function.
        blocks: Tensors of each adapted block, in order, by our names within the block.
        left: Names of the file's tensors that are not converted.
    """

    method: dict[str, Any]
    blocks: list[State]
    left: list[str] = field(default_factory=list)


def _by_block(state: State, pattern: str) -> dict[tuple[int, ...], State]:
    """Group tensors by the numbers of their block, sorted by these numbers.

    Args:
        state: The tensors.
        pattern: Regular expression. Its first group matches the block with its numbers, its last the rest of the name.

    Raises:
        ForeignAdapterError: No name matches.
    """
    blocks: dict[tuple[int, ...], State] = {}
    for name, value in state.items():
        match = re.search(pattern, name)
        if match:
            numbers = tuple(map(int, re.findall(r'\d+', match[1])))
            _put(blocks.setdefault(numbers, {}), match.groups()[-1], value, name)
    if not blocks:
        some = ', '.join(list(state)[:3]) or 'nothing'
        raise ForeignAdapterError(f'no tensor name matches {pattern}; the file has {some}, ...')
    return dict(sorted(blocks.items()))


def _put(block: State, key: str, value: Tensor, name: str) -> None:
    """Store a tensor of a block.

    Raises:
        ForeignAdapterError: The block already has a tensor of this name.
    """
    if key in block:
        raise ForeignAdapterError(
            f'{name} is the second tensor for {key} of one block. The file holds several adapters, or several towers '
            'whose blocks have the same numbers. Save one of them alone'
        )
    block[key] = value


def _left(state: State, pattern: str) -> list[str]:
    """Return the names of the tensors that a pattern does not match."""
    return [name for name in state if not re.search(pattern, name)]


def _rename(block: State, names: dict[str, str], where: str) -> State:
    """Rename all tensors of a block to our names.

    Raises:
        ForeignAdapterError: A tensor is missing, or has no counterpart here.
    """
    if block.keys() != names.keys():
        missing, unknown = sorted(names.keys() - block.keys()), sorted(block.keys() - names.keys())
        raise ForeignAdapterError(
            f'{where} is another variant than the one implemented here: missing {missing or "nothing"}, without '
            f'a counterpart {unknown or "nothing"}'
        )
    return {names[name]: value for name, value in block.items()}


def read_adaptformer(state: State, scale: float = 0.1) -> ForeignAdapter:
    """Convert AdaptFormer's adapters (Chen et al., NeurIPS 2022), as saved by the authors' code.

    The tensors are ``blocks.N.adaptmlp.{down_proj,up_proj}.{weight,bias}``, and ``adaptmlp.scale`` if the scale is
    learned. The variant with its own layer norm is refused.

    Args:
        state: Tensors of the checkpoint by name. Tensors that are not adapters are left out.
        scale: The factor used in training. The checkpoint does not store it. Defaults to 0.1, as in the authors' code.

    Raises:
        ForeignAdapterError: The file holds another variant.
    """
    pattern = r'(?:^|\.)blocks\.(\d+)\.adaptmlp\.(.+)$'
    blocks = _by_block(state, pattern)
    learned = all('scale' in block for block in blocks.values())
    names = {f'{a}_proj.{b}': f'adapter.{a}.{b}' for a in ('down', 'up') for b in ('weight', 'bias')}
    if learned:
        names['scale'] = 'adapter.scale'
    renamed = [_rename(block, names, f'blocks.{n[0]}.adaptmlp') for n, block in blocks.items()]
    if learned:  # the authors' scale has shape (1,)
        renamed = [{**block, 'adapter.scale': block['adapter.scale'].reshape(())} for block in renamed]
    bottleneck = len(renamed[0]['adapter.down.weight'])
    method = dict(type='adaptformer', bottleneck=bottleneck, scale=float(scale), learnable_scale=learned)
    return ForeignAdapter(method, renamed, _left(state, pattern))


_MONA = {
    'norm': 'norm',
    'gamma': 'gamma',
    'gammax': 'gammax',
    'project1': 'down',
    'adapter_conv.conv1': 'convs.0',
    'adapter_conv.conv2': 'convs.1',
    'adapter_conv.conv3': 'convs.2',
    'adapter_conv.projector': 'projector',
    'project2': 'up',
}


def read_mona(state: State) -> ForeignAdapter:
    """Convert Mona's adapters (Yin et al., CVPR 2025) of a Swin, as saved by the authors' code.

    ``layers.I.blocks.J.my_module_1`` follows attention, ``my_module_2`` follows the FFN.

    Args:
        state: Tensors of the checkpoint by name. Tensors that are not adapters are left out.

    Raises:
        ForeignAdapterError: The file holds another variant.
    """
    pattern = r'(?:^|\.)((?:layers|stages)\.\d+\.blocks\.\d+)\.(my_module_[12]\..+)$'
    blocks = _by_block(state, pattern)
    names = {
        f'{module}.{name}{kind}': f'{ours}.{own}{kind}'
        for module, ours in (('my_module_1', 'adapter_attention'), ('my_module_2', 'adapter'))
        for name, own in _MONA.items()
        for kind in (('',) if name.startswith('gamma') else ('.weight', '.bias'))
    }
    renamed = [_rename(block, names, f'layers.{n[0]}.blocks.{n[1]}') for n, block in blocks.items()]
    method = dict(type='mona', bottleneck=len(renamed[0]['adapter.down.weight']))
    return ForeignAdapter(method, renamed, _left(state, pattern))


# How layer names end in the models of transformers and timm, and the linear map each one is. Longer endings first.
_ROLES = {
    'attention.output.dense': 'o',
    'intermediate.dense': 'fc1',
    'output.dense': 'fc2',
    'query': 'q',
    'key': 'k',
    'value': 'v',
    'q_proj': 'q',
    'k_proj': 'k',
    'v_proj': 'v',
    'o_proj': 'o',
    'qkv': 'qkv',
    'attn.proj': 'o',
    'fc1': 'fc1',
    'fc2': 'fc2',
}
# Options of peft that do not affect the result: names, training settings, and what the tensors already define.
_NOTES = {
    'auto_mapping',
    'base_model_name_or_path',
    'ensure_weight_tying',
    'eva_config',
    'exclude_modules',
    'inference_mode',
    'lora_alpha',
    'lora_dropout',
    'megatron_core',
    'modules_to_save',
    'peft_type',
    'peft_version',
    'qalora_group_size',
    'r',
    'revision',
    'runtime_config',
    'target_modules',
    'task_type',
}
# Option values that give W + alpha / r * B A on an unchanged base. All other options must be off.
_PLAIN: dict[str, tuple] = {
    'bias': ('none',),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA modify the base. EVA and the others only change the initial values.
    'init_lora_weights': (True, False, None, 'gaussian', 'eva', 'orthogonal'),
}
_OFF: tuple = (None, False, [], {}, '')
# Modules outside the backbone, which peft saves whole (`modules_to_save`).
_HEADS = {
    'auxiliary_head',
    'classifier',
    'cls_classifier',
    'decode_head',
    'distillation_classifier',
    'fc',
    'head',
    'head_dist',
    'heads',
    'score',
}


def _role(layer: str) -> str:
    """Return which linear map of a block a layer is."""
    for ending, role in _ROLES.items():
        if layer == ending or layer.endswith(f'.{ending}'):
            return role
    raise ForeignAdapterError(
        f"the layer '{layer}' is none of the maps q, k, v, o, fc1, fc2; known names are {', '.join(_ROLES)}"
    )


def read_hf_lora(state: State, config: dict[str, Any]) -> ForeignAdapter:
    """Convert a LoRA of Hugging Face's peft for a ViT of transformers or timm.

    Tensor names have the form ``base_model.model. ... layer.N. ... query.lora_A.weight``. The LoRA of a joint ``qkv``
    becomes those of q, k and v with the same A.

    Args:
        state: Tensors of ``adapter_model.safetensors``. A head in it (``modules_to_save``) is left out.
        config: Content of ``adapter_config.json``.

    Raises:
        ForeignAdapterError: It is not plain LoRA, adapts different maps in different blocks, or changes the base.
    """
    _check_hf_config(config)
    pattern = r'(?:layer|layers|blocks)\.(\d+)\.(.+\.lora_\w+(?:\.\w+)*)$'
    left = _left(state, pattern)
    outside = [name for name in left if 'lora_' in name]
    if outside:
        raise ForeignAdapterError(f'{outside[0]} is a LoRA outside the blocks, which cannot be converted')
    trained = [name for name in left if not _HEADS & set(name.split('.'))]
    if trained:
        some = ', '.join(trained[:3]) + (', ...' if len(trained) > 3 else '')
        raise ForeignAdapterError(f'the file changes the base: it has {some}, which is not a head')
    blocks = []
    for tensors in _by_block(state, pattern).values():
        block: State = {}
        for name, value in tensors.items():
            match = re.fullmatch(r'(.+)\.lora_([AB])(?:\.\w+)?\.weight', name)
            if match is None:
                raise ForeignAdapterError(f"the tensor '{name}' is neither lora_A nor lora_B of a linear layer")
            for role, part in _parts(_role(match[1]), match[2].lower(), value):
                _put(block, f'adapter.{match[2].lower()}.{role}', part, name)
        blocks.append(block)
    method = dict(type='lora', rank=config['r'], alpha=config['lora_alpha'], targets=_targets(blocks))
    return ForeignAdapter(method, blocks, left)


def _check_hf_config(config: Any) -> None:
    """Refuse a config of peft that is not known to be plain LoRA."""
    if not isinstance(config, dict):
        raise ForeignAdapterError(
            f'adapter_config.json holds a {type(config).__name__}, expected a dictionary of options'
        )
    if config.get('peft_type') != 'LORA':
        raise ForeignAdapterError(f"peft_type is {shortened(config.get('peft_type'))!r}; only 'LORA' can be converted")
    other = [
        f'{key}={value!r}'
        for key, value in config.items()
        if key not in _NOTES
        and not any(type(value) is type(plain) and value == plain for plain in _PLAIN.get(key, _OFF))
    ]
    if other:
        raise ForeignAdapterError(
            'this LoRA is not known to be plain (W + alpha / r * B A in every block, on an unchanged base): '
            f'its config has {shortened(", ".join(sorted(other)), 500)}'
        )
    rank, alpha = config.get('r'), config.get('lora_alpha')
    if type(rank) is not int or rank < 1:
        raise ForeignAdapterError(f'the rank r must be a positive integer, but the config has {shortened(rank)}')
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ForeignAdapterError(f'lora_alpha must be a number, but the config has {shortened(alpha)}')


def _parts(role: str, factor: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Assign a factor to our roles. For a joint qkv, each role gets the same A and its own rows of B."""
    if role != 'qkv':
        return [(role, value)]
    return list(zip('qkv', value.chunk(3) if factor == 'b' else [value] * 3))


def _targets(blocks: list[State]) -> list[str]:
    """Return the adapted maps. They must be the same in every block."""
    found = [[role for role in ROLES if f'adapter.a.{role}' in block] for block in blocks]
    for index, roles in enumerate(found):
        if roles != found[0]:
            here, there = (', '.join(maps) or 'nothing' for maps in (roles, found[0]))
            raise ForeignAdapterError(
                f'block {index} adapts {here}, but block 0 adapts {there}; all blocks must adapt the same maps'
            )
    return found[0]


def read_mmpretrain_lora(state: State, model: nn.Module, config: Mapping[str, Any]) -> ForeignAdapter:
    """Convert the checkpoint of MMPretrain's own ``LoRAModel``.

    For each linear layer, ``backbone.module. ... .lora_down.weight`` is A and ``lora_up`` is B.

    Args:
        state: Tensors of the checkpoint. A head in it is left out.
        model: The unadapted model, whose layers the tensor names refer to.
        config: Options of the ``LoRAModel``: ``alpha``, ``rank`` and ``targets``. ``alpha`` alone is enough.

    Raises:
        ForeignAdapterError: Layers differ in rank or factor, or are not q, k, v, o, fc1 or fc2 of a block.
    """
    pattern = r'^(?:.*\.)?module\.(.+)\.lora_(down|up)\.weight$'
    sites = find_sites(find_backbone(model))
    layers = {
        f'{site.name}.{target.weight}'.removesuffix('.weight'): (index, target.role)
        for index, site in enumerate(sites)
        for target in _maps(site)
    }
    joint = {name for name, (index, role) in layers.items() if name.endswith('qkv')}
    blocks: list[State] = [{} for _ in sites]
    scales: dict[tuple[float, int], str] = {}
    for name, value in state.items():
        match = re.match(pattern, name)
        if match is None:
            if '.lora_' in name:
                raise ForeignAdapterError(f"the tensor '{name}' is neither lora_down nor lora_up of a LoRAModel")
            continue
        layer, factor = match[1].removeprefix('backbone.'), 'a' if match[2] == 'down' else 'b'
        if layer not in layers:
            raise ForeignAdapterError(
                f'{name}: {layer} is none of the maps {", ".join(ROLES)} of a block of '
                f'{type(find_backbone(model)).__name__}'
            )
        index, role = layers[layer]
        for one, part in _parts('qkv' if layer in joint else role, factor, value):
            _put(blocks[index], f'adapter.{factor}.{one}', part, name)
        if factor == 'a':
            scales.setdefault(_alpha_and_rank(config, match[1], len(value)), name)
    if not scales:
        some = ', '.join(list(state)[:3]) or 'nothing'
        raise ForeignAdapterError(
            f'no tensor name has the form of a LoRAModel (module. ... .lora_down); the file has {some}'
        )
    if len(scales) > 1:
        raise ForeignAdapterError(
            'layers differ in alpha and rank, which must be the same for all here: '
            + ', '.join(f'{alpha:g} and {rank} in {name}' for (alpha, rank), name in scales.items())
        )
    ((alpha, rank),) = scales
    method = dict(type='lora', rank=rank, alpha=alpha, targets=_targets(blocks))
    return ForeignAdapter(method, blocks, _left(state, pattern))


def _maps(site: Site) -> list[Any]:
    """Return the linear maps that a block has."""
    found = []
    for role in ROLES:
        try:
            found += find_targets(site, [role])
        except ValueError:
            continue  # the block lacks this map
    return found


def _alpha_and_rank(config: Mapping[str, Any], layer: str, rank: int) -> tuple[float, int]:
    """Return the factor and the rank that a LoRAModel gives a layer. The first matching target decides."""
    matching = [
        target
        for target in config.get('targets', ())
        if re.fullmatch(target['type'], layer) or layer.endswith(target['type'])
    ]
    if config.get('targets') and not matching:
        raise ForeignAdapterError(f"{layer} matches none of the LoRAModel's targets in the config")
    options = {**config, **(matching[0] if matching else {})}
    if options.get('rank', rank) != rank:
        raise ForeignAdapterError(f'{layer} has rank {rank} in the file, but {options["rank"]} in the config')
    return float(options.get('alpha', 1)), rank


def read_foreign(kind: str, path: Path, load: Callable[[Path], State], scale: float = 0.1) -> ForeignAdapter:
    """Read a file of another program.

    Args:
        kind: ``'adaptformer'``, ``'mona'`` or ``'hf-lora'``.
        path: The checkpoint. For ``'hf-lora'``, the safetensors file with ``adapter_config.json`` in the same folder.
        load: Function that reads the tensors of a file.
        scale: Factor of AdaptFormer's adapters. Defaults to 0.1.

    Raises:
        ForeignAdapterError: The file cannot be converted.
    """
    if kind == 'adaptformer':
        return read_adaptformer(load(path), scale)
    if kind == 'mona':
        return read_mona(load(path))
    config = path.with_name('adapter_config.json')
    if not config.is_file():
        raise ForeignAdapterError(f'{config} is missing; it holds the rank and the factor of {path.name}')
    try:
        options = parse_json(config.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ForeignAdapterError(f'{config} cannot be read: {shortened(str(error))}') from error
    return read_hf_lora(load(path), options)


def lora_model_of(model_cfg: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """Remove MMPretrain's ``LoRAModel`` from a model's config.

    Returns:
        The config without it, and its options; None if the config has no ``LoRAModel``.
    """
    if str(model_cfg.get('type', '')).rpartition('.')[2] == 'LoRAModel':
        return model_cfg['module'], model_cfg
    backbone = model_cfg.get('backbone')
    if isinstance(backbone, Mapping) and str(backbone.get('type', '')).rpartition('.')[2] == 'LoRAModel':
        model_cfg['backbone'] = backbone['module']
        return model_cfg, backbone
    return model_cfg, None


def inject_foreign(model: nn.Module, foreign: ForeignAdapter) -> None:
    """Adapt a model with an adapter of another program.

    Args:
        model: An unadapted model, with the base weights that the adapter was trained on.
        foreign: The adapter.

    Raises:
        ForeignAdapterError: The model has another number of blocks, or blocks of other sizes. It stays unchanged.
    """
    sites = find_sites(find_backbone(model))
    if len(sites) != len(foreign.blocks):
        raise ForeignAdapterError(
            f'the file has adapters for {len(foreign.blocks)} blocks, {type(find_backbone(model)).__name__} has '
            f'{len(sites)}'
        )
    inject(model, foreign.method)
    injection = get_injection(model)
    assert injection is not None
    attachments = injection.attachments
    own = [
        {f'{place}.{name}': p for place, adapter in a.adapters.items() for name, p in adapter.named_parameters()}
        for a in attachments
    ]
    fault = next(filter(None, map(_find_fault, attachments, own, foreign.blocks)), None)
    if fault:
        remove(model)
        raise ForeignAdapterError(fault)
    with torch.no_grad():
        for parameters, tensors in zip(own, foreign.blocks):
            for name, value in tensors.items():
                parameters[name].copy_(value)


def _find_fault(attachment: Any, own: dict[str, nn.Parameter], tensors: State) -> str | None:
    """Describe the first tensor that does not fit a block's adapter; None if all fit."""
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [tuple(side[name].shape) if name in side else 'missing' for side in (own, tensors)]
        if shapes[0] != shapes[1]:
            return f'{attachment.name}.{name} should be {shapes[0]}, but in the file it is {shapes[1]}'
    return None
