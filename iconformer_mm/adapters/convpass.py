"""Convolutional bypasses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BottleneckAdapter, MapConvolution, TokenGrid


class ConvpassAdapter(BottleneckAdapter):
    """Bottleneck with a full 3 x 3 convolution (Convpass, Jie and Deng, 2022, arXiv 2207.07039).

    ``s * (act(conv(act(x W_down + b_down))) W_up + b_up)``. The convolution starts as the
    identity. As in the paper, it treats each prefix token as a map of one pixel.

    Args:
        embed_dims: Width d of the host's tokens.
        bottleneck: Width c between the projections. Defaults to 8.
        kernel_size: Odd kernel size. Defaults to 3.
        activation: ``'gelu'`` or ``'relu'``. Defaults to ``'gelu'``.
        dropout: Dropout probability before the up-projection. Defaults to 0.1.
        scale: Factor s applied to the result. The paper tunes it per task. Defaults to 1.
        learnable_scale: Whether s is trained. Defaults to False.

    Raises:
        ValueError: An argument is out of its range, or the kernel size is even.
    """

    def __init__(
        self,
        embed_dims: int,
        bottleneck: int = 8,
        kernel_size: int = 3,
        activation: str = 'gelu',
        dropout: float = 0.1,
        scale: float = 1.0,
        learnable_scale: bool = False,
    ) -> None:
        super().__init__(embed_dims, bottleneck, activation, dropout, scale, learnable_scale)
        self.conv = MapConvolution(bottleneck, kernel_size)
        nn.init.zeros_(self.conv.bias)
        nn.init.dirac_(self.conv.weight)

    def transform(self, z: Tensor, grid: TokenGrid) -> Tensor:
        """Activate and convolve ``z`` (B, N, c)."""
        z = self.activation(z)
        prefix = grid.num_prefix_tokens
        if not prefix:
            return self.on_maps(self.conv, z, grid)
        centre = self.conv.weight.shape[-1] // 2
        pixel = F.linear(z[:, :prefix], self.conv.weight[:, :, centre, centre], self.conv.bias)
        return torch.cat((pixel, self.on_maps(self.conv, z, grid)[:, prefix:]), dim=1)
