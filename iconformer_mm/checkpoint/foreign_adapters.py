"""Adapters that other programs trained: AdaptFormer's and Mona's checkpoints, LoRA files of Hugging Face's peft.

Only what is exactly the same function here is converted; all else is an error that says what differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iconformer_mm.tuning.injection import find_backbone, get_injection, inject, remove
from iconformer_mm.tuning.sites import find_sites

State = dict[str, Tensor]


class ForeignAdapterError(ValueError):
    """An adapter of another program cannot be taken over."""


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of another program, in our terms.

    Attributes:
        method: Config of our method that computes the same.
        blocks: What each adapted block is given, in order, by our names within the block.
    """

    method: dict[str, Any]
    blocks: list[State]


def _by_block(state: State, pattern: str) -> dict[tuple[int, ...], State]:
    """Group tensors by the numbers of their block, in order of these.

    Args:
        state: The tensors.
        pattern: Regular expression; its first group has the numbers of a block, its last what follows.

    Raises:
        ForeignAdapterError: No name fits.
    """
    blocks: dict[tuple[int, ...], State] = {}
    for name, value in state.items():
        match = re.search(pattern, name)
        if match:
            numbers = tuple(map(int, re.findall(r'\d+', match[1])))
            blocks.setdefault(numbers, {})[match.groups()[-1]] = value
    if not blocks:
        some = ', '.join(list(state)[:3]) or 'nothing'
        raise ForeignAdapterError(f'no name of a tensor is of the form {pattern}; the file has {some}, ...')
    return dict(sorted(blocks.items()))


def _rename(block: State, names: dict[str, str], where: str) -> State:
    """Give all tensors of a block our names.

    Raises:
        ForeignAdapterError: A tensor is missing, or is one that we have no place for.
    """
    if block.keys() != names.keys():
        missing, unknown = sorted(names.keys() - block.keys()), sorted(block.keys() - names.keys())
        raise ForeignAdapterError(
            f'{where} is another variant than the one that is computed here: missing {missing or "nothing"}, without '
            f'a counterpart {unknown or "nothing"}'
        )
    return {names[name]: value for name, value in block.items()}


def read_adaptformer(state: State, scale: float = 0.1) -> ForeignAdapter:
    """Take over AdaptFormer's adapters (Chen et al., NeurIPS 2022), as its authors' code saves them.

    ``blocks.N.adaptmlp.{down_proj,up_proj}.{weight,bias}``, and ``adaptmlp.scale`` where it is learned. The
    variant with a layer norm of its own is refused.

    Args:
        state: Tensors of the checkpoint by name; others than adapters are left.
        scale: The factor that it was trained with, which its checkpoint does not hold. Defaults to 0.1, as there.

    Raises:
        ForeignAdapterError: It is another variant.
    """
    blocks = _by_block(state, r'(?:^|\.)blocks\.(\d+)\.adaptmlp\.(.+)$')
    learned = all('scale' in block for block in blocks.values())
    names = {f'{a}_proj.{b}': f'adapter.{a}.{b}' for a in ('down', 'up') for b in ('weight', 'bias')}
    if learned:
        names['scale'] = 'adapter.scale'
    renamed = [_rename(block, names, f'blocks.{n[0]}.adaptmlp') for n, block in blocks.items()]
    if learned:  # of shape (1,) there
        renamed = [{**block, 'adapter.scale': block['adapter.scale'].reshape(())} for block in renamed]
    bottleneck = len(renamed[0]['adapter.down.weight'])
    method = dict(type='adaptformer', bottleneck=bottleneck, scale=float(scale), learnable_scale=learned)
    return ForeignAdapter(method, renamed)


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
    """Take over Mona's adapters (Yin et al., CVPR 2025) of a Swin, as its authors' code saves them.

    ``layers.I.blocks.J.my_module_1`` stands behind attention, ``my_module_2`` behind the FFN.

    Args:
        state: Tensors of the checkpoint by name; others than adapters are left.

    Raises:
        ForeignAdapterError: It is another variant.
    """
    blocks = _by_block(state, r'(?:^|\.)((?:layers|stages)\.\d+\.blocks\.\d+)\.(my_module_[12]\..+)$')
    names = {
        f'{module}.{name}{kind}': f'{ours}.{own}{kind}'
        for module, ours in (('my_module_1', 'adapter_attention'), ('my_module_2', 'adapter'))
        for name, own in _MONA.items()
        for kind in (('',) if name.startswith('gamma') else ('.weight', '.bias'))
    }
    renamed = [_rename(block, names, f'layers.{n[0]}.blocks.{n[1]}') for n, block in blocks.items()]
    return ForeignAdapter(dict(type='mona', bottleneck=len(renamed[0]['adapter.down.weight'])), renamed)


# The last words of a layer's name, in transformers' and timm's models, and the map it is. The longer ones first.
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
# What would make peft compute something else than W + alpha / r * B A.
_OTHER_LORA = ('use_dora', 'use_rslora', 'fan_in_fan_out', 'rank_pattern', 'alpha_pattern', 'layers_to_transform')


def _role(layer: str) -> str:
    """Which map of a block a layer is."""
    for ending, role in _ROLES.items():
        if layer == ending or layer.endswith(f'.{ending}'):
            return role
    raise ForeignAdapterError(f"the layer '{layer}' is none of the maps q, k, v, o, fc1, fc2: {', '.join(_ROLES)}")


def read_hf_lora(state: State, config: dict[str, Any]) -> ForeignAdapter:
    """Take over a LoRA of Hugging Face's peft for a ViT of transformers or timm.

    ``base_model.model. ... layer.N. ... query.lora_A.weight``. One of a joint ``qkv`` is one of q, k and v with one A.

    Args:
        state: Tensors of ``adapter_model.safetensors``; a head in it (``modules_to_save``) is left.
        config: Content of ``adapter_config.json``.

    Raises:
        ForeignAdapterError: It is another variant than plain LoRA, the same maps in all blocks.
    """
    if config.get('peft_type') != 'LORA':
        raise ForeignAdapterError(f"peft_type is {config.get('peft_type')!r}; 'LORA' is what can be taken over")
    other = [key for key in _OTHER_LORA if config.get(key)]
    if config.get('bias', 'none') != 'none':
        other.append('bias')
    if other:
        raise ForeignAdapterError(
            f'this LoRA is not the plain one (W + alpha / r * B A in every block): its config has '
            f'{", ".join(f"{key}={config[key]!r}" for key in other)}'
        )
    found = _by_block(state, r'(?:layer|layers|blocks)\.(\d+)\.(.+\.lora_\w+(?:\.\w+)*)$')
    blocks = []
    for tensors in found.values():
        block: State = {}
        for name, value in tensors.items():
            match = re.fullmatch(r'(.+)\.lora_([AB])(?:\.\w+)?\.weight', name)
            if match is None:
                raise ForeignAdapterError(f"the tensor '{name}' is neither lora_A nor lora_B of a linear layer")
            role, factor = _role(match[1]), match[2].lower()
            if role == 'qkv':
                parts = value.chunk(3) if factor == 'b' else [value] * 3
                block.update({f'adapter.{factor}.{one}': part for one, part in zip('qkv', parts)})
            else:
                block[f'adapter.{factor}.{role}'] = value
        blocks.append(block)
    targets = [role for role in ('q', 'k', 'v', 'o', 'fc1', 'fc2') if f'adapter.a.{role}' in blocks[0]]
    return ForeignAdapter(dict(type='lora', rank=config['r'], alpha=config['lora_alpha'], targets=targets), blocks)


def read_foreign(kind: str, path: Path, load: Callable[[Path], State], scale: float = 0.1) -> ForeignAdapter:
    """Read a file of another program.

    Args:
        kind: ``'adaptformer'``, ``'mona'`` or ``'hf-lora'``.
        path: The checkpoint; for ``'hf-lora'`` the safetensors file, with ``adapter_config.json`` beside it.
        load: Reads the tensors of a file.
        scale: Factor of AdaptFormer's adapters. Defaults to 0.1.

    Raises:
        ForeignAdapterError: It cannot be taken over.
    """
    if kind == 'adaptformer':
        return read_adaptformer(load(path), scale)
    if kind == 'mona':
        return read_mona(load(path))
    config = path.with_name('adapter_config.json')
    if not config.is_file():
        raise ForeignAdapterError(f'{config} is missing, which says what rank and factor {path.name} has')
    return read_hf_lora(load(path), json.loads(config.read_text(encoding='utf-8')))


def inject_foreign(model: nn.Module, foreign: ForeignAdapter) -> None:
    """Adapt a model with an adapter of another program.

    Args:
        model: An unadapted model, with the base weights that the adapter was trained on.
        foreign: The adapter.

    Raises:
        ForeignAdapterError: The model has another number of blocks, or blocks of other sizes. It is unchanged then.
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
    """Where a block's tensors do not fit its adapter, if anywhere."""
    for name in sorted(own.keys() | tensors.keys()):
        shapes = [tuple(side[name].shape) if name in side else 'missing' for side in (own, tensors)]
        if shapes[0] != shapes[1]:
            return f'{attachment.name}.{name} would be {shapes[0]}, in the file it is {shapes[1]}'
    return None
