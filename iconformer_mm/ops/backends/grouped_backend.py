"""One grouped convolution over the B * C maps of a batch, by the library of the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import apart
from .reference_backend import as_maps, behind_prefix


def without_half(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Computes float16 on a CPU in float32: the CPU's convolutions of torch 2.1 have no float16."""

    @wraps(function)
    def call(first: Tensor, second: Tensor, *settings: Any) -> Tensor:
        if first.dtype == torch.float16 and first.device.type == 'cpu':
            return function(first.float(), second.float(), *settings).half()
        return function(first, second, *settings)

    return call


@without_half
def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """The filtered tokens; see the package."""
    (batch, _, channels), size = tokens.shape, kernels.shape[-1]
    maps = as_maps(tokens, height, width).permute(0, 3, 1, 2).reshape(1, batch * channels, height, width)
    weight = kernels.reshape(batch * channels, 1, size, size)
    out = F.conv2d(maps, weight, padding=size // 2, groups=batch * channels)
    return behind_prefix(tokens, out.view(batch, channels, height, width).permute(0, 2, 3, 1)).contiguous()


def weight_gradient(grad: Tensor, maps: Tensor, size: int) -> Tensor:
    """The gradient of the weight of a depth-wise convolution, (G, 1, K, K), from maps (N, G, H, W)."""
    groups, half = maps.shape[1], size // 2
    weight = maps.new_empty(groups, 1, size, size)
    settings = dict(bias_sizes=None, stride=[1, 1], padding=[half, half], dilation=[1, 1], transposed=False)
    return torch.ops.aten.convolution_backward(
        grad, maps, weight, **settings, output_padding=[0, 0], groups=groups, output_mask=[False, True, False]
    )[1]


@without_half
def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """The gradient of the kernels; see the package."""
    batch, _, channels = tokens.shape
    shape = (1, batch * channels, height, width)
    grad, maps = (as_maps(t, height, width).permute(0, 3, 1, 2).reshape(shape) for t in (grad, tokens))
    return weight_gradient(grad, maps, size).view(batch, channels, size, size)


gradients = apart(correlate, kernel_gradient)
