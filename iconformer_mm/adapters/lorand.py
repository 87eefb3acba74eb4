"""Adapters whose projections are products of small matrices."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Adapter, check_count


class LoRandAdapter(Adapter):
    """Bottleneck with low-rank projections (LoRand, Yin et al., CVPR 2023).

    ``gelu(x W_down + b_down) W_up + b_up``, added to the adapter's input. Each projection
    is a sum of ``P K Q`` over branches. Both projections share the small kernels ``K``.
    The ``Q`` of the up-projection starts at zero (ours).

    Args:
        embed_dims: Width d of the host's tokens.
        reduction: Ratio of d to the bottleneck's width. Defaults to 2.
        kernel_dims: Width of the kernels K. Defaults to 8.
        branches: Number of branches: 2 (LoRand), 4 (LoRand+), 8 (LoRand++). Defaults to 2.

    Raises:
        ValueError: An argument is out of its range.
    """

    needs_grid = False

    def __init__(self, embed_dims: int, reduction: int = 2, kernel_dims: int = 8, branches: int = 2) -> None:
        super().__init__()
        sizes = dict(embed_dims=embed_dims, reduction=reduction, kernel_dims=kernel_dims, branches=branches)
        for name, value in sizes.items():
            check_count(name, value)
        bottleneck = max(embed_dims // reduction, 1)
        self.down_p = nn.Parameter(torch.empty(branches, embed_dims, kernel_dims))
        self.down_q = nn.Parameter(torch.empty(branches, kernel_dims, bottleneck))
        self.kernels = nn.Parameter(torch.empty(branches, kernel_dims, kernel_dims))
        self.up_p = nn.Parameter(torch.empty(branches, bottleneck, kernel_dims))
        self.up_q = nn.Parameter(torch.zeros(branches, kernel_dims, embed_dims))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(embed_dims))
        for matrices in (self.down_p, self.down_q, self.kernels, self.up_p):
            for matrix in matrices:
                nn.init.kaiming_uniform_(matrix.data, a=math.sqrt(5))

    def projections(self) -> tuple[Tensor, Tensor]:
        """Compute the projections from the small matrices, (d, c) and (c, d)."""
        down = (self.down_p @ self.kernels @ self.down_q).sum(0)
        up = (self.up_p @ self.kernels @ self.up_q).sum(0)
        return down, up

    def forward(self, tokens: Tensor, grid: Any = None) -> Tensor:
        """Compute the delta, (B, N, d)."""
        down, up = self.projections()
        z = F.gelu(F.linear(tokens, down.t(), self.down_bias))
        return F.linear(z, up.t(), self.up_bias)
