"""One grouped convolution over the B * C maps of a batch, by the device's library.

We pad the maps explicitly. Libraries skip their own padding, and would miss that zero times infinity is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import apart
from .reference_backend import as_maps, behind_prefix, with_padding


def without_half(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute float16 on a CPU in float32. In torch 2.1, convolutions on the CPU do not support float16."""

    @wraps(function)
    def call(first: Tensor, second: Tensor, *settings: Any) -> Tensor:
        if first.dtype == torch.float16 and first.device.type == 'cpu':
            return function(first.float(), second.float(), *settings).half()
        return function(first, second, *settings)

    return call


def _as_channels(maps: Tensor) -> Tensor:
    """Reshape (B, H, W, C) to the channels of one map, (1, B * C, H, W)."""
    return maps.permute(0, 3, 1, 2).flatten(0, 1).unsqueeze(0)


@without_half
def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """Return the filtered tokens; see the package docstring."""
    (batch, _, channels), size = tokens.shape, kernels.shape[-1]
    maps = _as_channels(with_padding(as_maps(tokens, height, width), size))
    weight = kernels.reshape(batch * channels, 1, size, size)
    out = F.conv2d(maps, weight, groups=batch * channels)
    return behind_prefix(tokens, out.view(batch, channels, height, width).permute(0, 2, 3, 1)).contiguous()


def weight_gradient(grad: Tensor, maps: Tensor, size: int) -> Tensor:
    """Return the gradient of a depth-wise convolution's weight, (G, 1, K, K), from padded maps."""
    groups = maps.shape[1]
    weight = maps.new_empty(groups, 1, size, size)
    settings = dict(bias_sizes=None, stride=[1, 1], padding=[0, 0], dilation=[1, 1], transposed=False)
    return torch.ops.aten.convolution_backward(
        grad, maps, weight, **settings, output_padding=[0, 0], groups=groups, output_mask=[False, True, False]
    )[1]


@without_half
def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """Return the gradient of the kernels; see the package docstring."""
    batch, _, channels = tokens.shape
    grad = _as_channels(as_maps(grad, height, width))
    maps = _as_channels(with_padding(as_maps(tokens, height, width), size))
    return weight_gradient(grad, maps, size).view(batch, channels, size, size)


gradients = apart(correlate, kernel_gradient)
