"""The definition, in shifted products: any shape, any dtype, and any exporter of graphs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import apart


def as_maps(tokens: Tensor, height: int, width: int) -> Tensor:
    """The patch tokens of (B, P + H * W, C) as maps, (B, H, W, C)."""
    prefix = tokens.shape[1] - height * width
    return (tokens[:, prefix:] if prefix else tokens).unflatten(1, (height, width))


def behind_prefix(tokens: Tensor, maps: Tensor) -> Tensor:
    """Maps (B, H, W, C) as tokens, behind the prefix tokens of ``tokens``."""
    prefix = tokens.shape[1] - maps.shape[1] * maps.shape[2]
    patches = maps.flatten(1, 2)
    return torch.cat((tokens[:, :prefix], patches), dim=1) if prefix else patches


def _neighbours(maps: Tensor, size: int) -> list[Tensor]:
    """What each tap of a kernel sees, row by row."""
    half, (height, width) = size // 2, maps.shape[1:3]
    padded = F.pad(maps, (0, 0, half, half, half, half))
    return [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]


def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """Sum of the K * K shifted maps, each times its tap."""
    maps = as_maps(tokens, height, width)
    taps = kernels.flatten(2).unbind(2)
    out = torch.zeros_like(maps)
    for neighbour, tap in zip(_neighbours(maps, kernels.shape[-1]), taps):
        out = out + neighbour * tap[:, None, None]
    return behind_prefix(tokens, out)


def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """Sum over the map of the gradient times each of the K * K shifted maps."""
    grad, maps = as_maps(grad, height, width), as_maps(tokens, height, width)
    taps = [(grad * neighbour).sum(dim=(1, 2)) for neighbour in _neighbours(maps, size)]
    return torch.stack(taps, dim=2).unflatten(2, (size, size))


gradients = apart(correlate, kernel_gradient)
