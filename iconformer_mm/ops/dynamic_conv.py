"""Depth-wise convolution whose kernels differ from sample to sample."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _reference(x: Tensor, kernels: Tensor) -> Tensor:
    """Sum of the K * K shifted maps, each times its tap; holds for any shape."""
    height, width = x.shape[1:3]
    size = kernels.shape[-1]
    padded = F.pad(x, (0, 0, size // 2, size // 2, size // 2, size // 2))
    out = torch.zeros_like(x)
    for i in range(size):
        for j in range(size):
            tap = kernels[:, None, None, :, i, j]
            out = out + padded[:, i : i + height, j : j + width] * tap
    return out


def _grouped(x: Tensor, kernels: Tensor) -> Tensor:
    """One grouped convolution over the B * C maps of the batch."""
    batch, height, width, channels = x.shape
    size = kernels.shape[-1]
    maps = x.permute(0, 3, 1, 2).reshape(1, batch * channels, height, width)
    out = F.conv2d(maps, kernels.reshape(batch * channels, 1, size, size), padding=size // 2, groups=batch * channels)
    return out.view(batch, channels, height, width).permute(0, 2, 3, 1)


_BACKENDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {'reference': _reference, 'grouped': _grouped}


def _choose(x: Tensor) -> str:
    # A grouped convolution needs at least one group, and in an exported graph
    # its number of groups would fix the batch size for good.
    exporting = torch.onnx.is_in_onnx_export() or getattr(torch.compiler, 'is_exporting', bool)()
    return 'reference' if exporting or x.numel() == 0 else 'grouped'


def dynamic_depthwise_conv2d(x: Tensor, kernels: Tensor, backend: str = 'auto') -> Tensor:
    """Convolve every channel of every sample with a kernel of its own.

    ``out[b, h, w, c] = sum_ij kernels[b, c, i, j] * x[b, h + i - K // 2, w + j - K // 2, c]``:
    cross-correlation with stride 1 and zero padding ``K // 2``, the adaptive
    convolution of iConFormer (arXiv 2409.02838).

    Args:
        x: Feature maps, (B, H, W, C).
        kernels: Kernels, (B, C, K, K) with odd K.
        backend: ``'reference'`` (shifted products, any shape), ``'grouped'``
            (one grouped convolution) or ``'auto'``, which takes the faster one
            that serves.

    Returns:
        The filtered maps, (B, H, W, C).

    Raises:
        ValueError: A shape or the backend's name does not fit.
    """
    if x.dim() != 4 or kernels.dim() != 4:
        raise ValueError(
            'dynamic_depthwise_conv2d expects x (B, H, W, C) and kernels (B, C, K, K), '
            f'got {tuple(x.shape)} and {tuple(kernels.shape)}'
        )
    size = kernels.shape[-1]
    if kernels.shape[-2] != size or size % 2 == 0:
        raise ValueError(f'kernels must be square with an odd size, got {kernels.shape[-2]} x {size}')
    if kernels.shape[0] != x.shape[0] or kernels.shape[1] != x.shape[3]:
        raise ValueError(
            f'x {tuple(x.shape)} (B, H, W, C) and kernels {tuple(kernels.shape)} (B, C, K, K) '
            'differ in batch size or channels'
        )
    if backend == 'auto':
        backend = _choose(x)
    if backend not in _BACKENDS:
        raise ValueError(f"unknown backend '{backend}', choose from: auto, {', '.join(_BACKENDS)}")
    return _BACKENDS[backend](x, kernels)
