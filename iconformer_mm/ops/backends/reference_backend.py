"""The definition of the dynamic convolution, as a sum of shifted products.

It supports every shape and dtype, graph exporters and the transforms of torch.func. The padding consists of
ordinary zeros. So a tap that is NaN or infinite also makes outputs NaN where it multiplies only padding. Shapes are
changed with view and reshape, because batched gradients do not support flatten and unflatten.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import apart


def as_maps(tokens: Tensor, height: int, width: int) -> Tensor:
    """Return the patch tokens of (B, P + H * W, C) as maps, (B, H, W, C)."""
    batch, count, channels = tokens.shape
    prefix = count - height * width
    return (tokens[:, prefix:] if prefix else tokens).view(batch, height, width, channels)


def behind_prefix(tokens: Tensor, maps: Tensor) -> Tensor:
    """Return maps (B, H, W, C) as tokens, after the prefix tokens of ``tokens``."""
    batch, height, width, channels = maps.shape
    prefix = tokens.shape[1] - height * width
    patches = maps.reshape(batch, height * width, channels)
    return torch.cat((tokens[:, :prefix], patches), dim=1) if prefix else patches


def with_padding(maps: Tensor, size: int) -> Tensor:
    """Pad maps (B, H, W, C) with K // 2 zeros on every side."""
    half = size // 2
    return F.pad(maps, (0, 0, half, half, half, half)) if half else maps


def _neighbours(maps: Tensor, size: int) -> list[Tensor]:
    """Return the shifted map that each tap of a kernel multiplies, in row-major order."""
    height, width = maps.shape[1:3]
    padded = with_padding(maps, size)
    return [padded[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]


def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """Sum the K * K shifted maps, each times its tap."""
    maps = as_maps(tokens, height, width)
    batch, channels, size, _ = kernels.shape
    taps = kernels.reshape(batch, channels, size * size).unbind(2)
    out = torch.zeros_like(maps)
    for neighbour, tap in zip(_neighbours(maps, size), taps):
        out = out + neighbour * tap[:, None, None]
    return behind_prefix(tokens, out)


def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """Multiply the gradient by each of the K * K shifted maps, and sum over the map."""
    grad, maps = as_maps(grad, height, width), as_maps(tokens, height, width)
    taps = [(grad * neighbour).sum(dim=(1, 2)) for neighbour in _neighbours(maps, size)]
    return torch.stack(taps, dim=2).reshape(maps.shape[0], maps.shape[3], size, size)


gradients = apart(correlate, kernel_gradient)
