"""Adapters with several depth-wise convolutions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .base import BottleneckAdapter, MapConvolution, Projection, TokenGrid


class MonaAdapter(BottleneckAdapter):
    """Multi-cognitive visual adapter (Mona, Yin et al., CVPR 2025).

    The steps are: a scaled layer norm, ``LN(x) * gamma + x * gammax``; down-projection;
    the mean of depth-wise 3 x 3, 5 x 5 and 7 x 7 convolutions, added to its input; a
    1 x 1 convolution, added to its input; GELU; dropout; up-projection. The result is
    added to the adapter's input. As in the authors' code, the up-projection does not
    start at zero, so the injection changes the outputs immediately. Prefix tokens skip
    the convolutions (ours; Mona targets Swin).

    Args:
        embed_dims: Width d of the host's tokens.
        bottleneck: Width c between the projections. Defaults to 64.
        dropout: Dropout probability after the activation. Defaults to 0.1.

    Raises:
        ValueError: An argument is out of its range.
    """

    patch_only = ('convs', 'projector')

    def __init__(self, embed_dims: int, bottleneck: int = 64, dropout: float = 0.1) -> None:
        super().__init__(embed_dims, bottleneck, 'gelu', dropout, 1.0, False)
        self.norm = nn.LayerNorm(embed_dims)
        self.gamma = nn.Parameter(torch.full((embed_dims,), 1e-6))
        self.gammax = nn.Parameter(torch.ones(embed_dims))
        self.convs = nn.ModuleList(MapConvolution(bottleneck, size, groups=bottleneck) for size in (3, 5, 7))
        self.projector = MapConvolution(bottleneck, 1)
        for projection in (self.down, self.up):
            _init_as_linear(projection)

    def _filter(self, maps: Tensor) -> Tensor:
        maps = sum(conv(maps) for conv in self.convs) / len(self.convs) + maps
        return self.projector(maps) + maps

    def transform(self, z: Tensor, grid: TokenGrid) -> Tensor:
        """Filter the patch tokens of ``z`` (B, N, c)."""
        return self.on_maps(self._filter, z, grid)

    def forward(self, tokens: Tensor, grid: Any = None) -> Tensor:
        """Compute the delta, (B, N, d)."""
        return super().forward(self.norm(tokens) * self.gamma + tokens * self.gammax, grid)


def _init_as_linear(projection: Projection) -> None:
    """Initialise as ``nn.Linear`` does."""
    bound = 1 / math.sqrt(projection.weight.shape[1])
    nn.init.uniform_(projection.weight, -bound, bound)
    if projection.bias is not None:
        nn.init.uniform_(projection.bias, -bound, bound)
