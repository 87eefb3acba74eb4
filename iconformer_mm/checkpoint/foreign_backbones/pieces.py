"""Taking a recognised backbone apart: what all writers share."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .recognition import ForeignBackboneError, Recognised, State, prefixes


class Pieces:
    """Takes tensors out of the common names, and knows at the end what no one took."""

    def __init__(self, found: Recognised) -> None:
        self.found = found
        self.rest = dict(found.tensors)
        self.out: State = {}

    def has(self, name: str) -> bool:
        """Whether a tensor is there, and no one took it."""
        return name in self.rest

    def take(self, name: str) -> Tensor:
        """Take a tensor by its common name.

        Raises:
            ForeignBackboneError: There is none.
        """
        if name not in self.rest:
            raise ForeignBackboneError(f'the file looks like {self.found.family}, and lacks {name} (common name)')
        return self.rest.pop(name)

    def move(self, name: str, target: str) -> None:
        """Take a tensor, and give it its name in the target."""
        self.out[target] = self.take(name)

    def both(self, name: str, target: str) -> None:
        """A weight and, where there is one, its bias."""
        self.move(name + '.weight', target + '.weight')
        if self.has(name + '.bias'):
            self.move(name + '.bias', target + '.bias')

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, taken or not."""
        return tuple(self.found.tensors[name].shape)

    def depth(self) -> int:
        """The number of blocks."""
        return len(prefixes(self.found.tensors))

    def depths(self) -> list[int]:
        """The number of blocks of each stage."""
        stages = [int(p.split('.')[1]) for p in prefixes(self.found.tensors)]
        return [stages.count(s) for s in range(max(stages) + 1)]


def grid_side(number: int, family: str) -> int:
    """The side of a square grid of so many positions.

    Raises:
        ForeignBackboneError: They are no square.
    """
    side = math.isqrt(number)
    if side * side != number:
        raise ForeignBackboneError(
            f'the positions of this {family} are {number}, no square grid; only square ones are converted'
        )
    return side


# Published ViTs whose heads are not 64 wide: family and width, and the number of heads.
_HEADS = {
    ('ViT', 1280): 16,
    ('MAE', 1280): 16,
    ('CLIP', 1280): 16,
    ('CLIP', 1408): 16,
    ('CLIP', 1664): 16,
    ('SigLIP', 1152): 16,
    ('SigLIP', 1536): 16,
    ('DINOv3', 4096): 32,
}


def num_heads(family: str, width: int) -> int:
    """The number of heads of a plain ViT, which no tensor tells: that of the published model, else ``width / 64``.

    Raises:
        ForeignBackboneError: It is no published model, and 64 does not divide its width.
    """
    known = _HEADS.get((family, width))
    if known is None and width > 64 and width % 64:
        raise ForeignBackboneError(
            f'the number of heads of this {family} is unknown: no tensor tells it, no published model is {width} wide, '
            'and heads of 64 channels do not fit'
        )
    return known or max(width // 64, 1)


def vit_facts(x: Pieces, prefix: int) -> dict[str, Any]:
    """Width, depth and the like of a plain ViT."""
    width, _, patch, _ = x.shape('patch.weight')
    hidden = x.shape('blocks.0.fc2.weight')[1]
    facts = dict(width=width, patch=patch, depth=x.depth(), hidden=hidden, heads=num_heads(x.found.family, width))
    if 'pos' in x.found.tensors:
        facts['image'] = grid_side(x.shape('pos')[1] - prefix, x.found.family) * patch
    return facts


def arch_of(facts: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a ViT as MMPretrain's ``arch``."""
    return dict(
        embed_dims=facts['width'],
        num_layers=facts['depth'],
        num_heads=facts['heads'],
        feedforward_channels=facts['hidden'],
    )


def num_prefix(x: Pieces) -> int:
    """How many of the positions are those of tokens."""
    return int(x.has('cls')) + int(x.has('dist'))


def fuse_gate(x: Pieces, block: str, target: str) -> None:
    """Put the gate and the value of a gated FFN into one map, the gate first."""
    for kind in ('weight', 'bias'):
        if x.has(block + f'gate.{kind}'):
            x.out[f'{target}.{kind}'] = torch.cat([x.take(block + f'gate.{kind}'), x.take(block + f'value.{kind}')])


def split_bias(x: Pieces, block: str, target: str) -> None:
    """One qkv with a bias of q and of v apart; that of k is zero."""
    x.move(block + 'qkv.weight', target + 'qkv.weight')
    if x.has(block + 'qkv.bias'):
        q, k, v = x.take(block + 'qkv.bias').chunk(3)
        if k.any():
            raise ForeignBackboneError(f'{block}k has a bias, which the class has not')
        x.out[target + 'q_bias'], x.out[target + 'v_bias'] = q.clone(), v.clone()


def sam_facts(x: Pieces) -> dict[str, Any]:
    """The sizes of SAM's ViT."""
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


def swin_facts(x: Pieces) -> dict[str, Any]:
    """The sizes of a Swin."""
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
