"""One depth-wise convolution per sample. It transposes nothing, which is faster for large maps on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import apart
from .grouped_backend import weight_gradient, without_half
from .reference_backend import as_maps, behind_prefix, with_padding


@without_half
def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """Return the filtered tokens; see the package docstring."""
    channels, size = kernels.shape[1], kernels.shape[-1]
    maps = with_padding(as_maps(tokens, height, width), size).permute(0, 3, 1, 2)
    out = [F.conv2d(one, weight, groups=channels) for one, weight in zip(maps.split(1), kernels.unsqueeze(2))]
    return behind_prefix(tokens, torch.cat(out).permute(0, 2, 3, 1)).contiguous()


@without_half
def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """Return the gradient of the kernels; see the package docstring."""
    grads = as_maps(grad, height, width).permute(0, 3, 1, 2).split(1)
    maps = with_padding(as_maps(tokens, height, width), size).permute(0, 3, 1, 2).split(1)
    return torch.stack([weight_gradient(*pair, size).squeeze(1) for pair in zip(grads, maps)])


gradients = apart(correlate, kernel_gradient)
