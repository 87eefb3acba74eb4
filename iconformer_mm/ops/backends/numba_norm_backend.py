"""FilterNorm as CPU code compiled by Numba.

A kernel has only a few numbers, so the overhead of torch's operators would dominate. The normalised kernels
have their channels innermost in memory, as the dynamic convolution expects.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .numba_backend import jitted, to_array


@jitted
def _normalise(raw: np.ndarray, gamma: np.ndarray, beta: np.ndarray, eps: float, out: np.ndarray) -> None:
    """Normalise ``raw`` (B, C, K * K) with ``gamma`` and ``beta`` (C, K * K) into ``out`` (B, K * K, C)."""
    batch, channels, count = raw.shape
    size = math.sqrt(count)
    for b in range(batch):
        for c in range(channels):
            mean = raw[b, c].sum() / count
            squares = 0.0
            for t in range(count):
                squares += (raw[b, c, t] - mean) ** 2
            scale = size / (math.sqrt(squares) + size * eps)
            for t in range(count):
                out[b, t, c] = beta[c, t] + gamma[c, t] * scale * (raw[b, c, t] - mean)


@jitted
def _gradients(
    grad: np.ndarray,
    raw: np.ndarray,
    gamma: np.ndarray,
    eps: float,
    grad_raw: np.ndarray,
    grad_gamma: np.ndarray,
    grad_beta: np.ndarray,
) -> None:
    """Compute the gradients from ``grad`` (B, K * K, C); ``grad_gamma`` and ``grad_beta`` (C, K * K) accumulate."""
    batch, channels, count = raw.shape
    size = math.sqrt(count)
    for b in range(batch):
        for c in range(channels):
            mean = raw[b, c].sum() / count
            squares, product, total = 0.0, 0.0, 0.0
            for t in range(count):
                centred, inner = raw[b, c, t] - mean, grad[b, t, c] * gamma[c, t]
                squares += centred**2
                product += inner * centred
                total += inner
            norm = math.sqrt(squares)
            scale = size / (norm + size * eps)
            # The gradient through the norm; it is zero at zero.
            through = product * scale * scale / (size * norm) if norm > 0 else 0.0
            for t in range(count):
                centred, g = raw[b, c, t] - mean, grad[b, t, c]
                grad_raw[b, c, t] = scale * (g * gamma[c, t] - total / count) - through * centred
                grad_gamma[c, t] += g * scale * centred
                grad_beta[c, t] += g


def _flat(tensor: Tensor, *shape: int) -> np.ndarray:
    """Copy (..., K, K) into an array with the given shape, (..., K * K)."""
    return np.ascontiguousarray(to_array(tensor, copy=True)).reshape(shape)


def normalise(raw: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return the normalised kernels, (B, C, K, K)."""
    batch, channels, size, _ = raw.shape
    count = size * size
    values = _flat(raw, batch, channels, count)
    out = np.empty((batch, count, channels), values.dtype)
    _normalise(values, _flat(gamma, channels, count), _flat(beta, channels, count), eps, out)
    return torch.from_numpy(out.reshape(batch, size, size, channels).transpose(0, 3, 1, 2)).to(raw.dtype)


def gradients(grad: Tensor, raw: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the raw kernels, (B, C, K, K), and of gamma and beta, (C, K, K)."""
    batch, channels, size, _ = raw.shape
    count = size * size
    values, factors = _flat(raw, batch, channels, count), _flat(gamma, channels, count)
    taps = np.ascontiguousarray(to_array(grad).transpose(0, 2, 3, 1)).reshape(batch, count, channels)
    grad_raw, grad_gamma, grad_beta = np.empty_like(values), np.zeros_like(factors), np.zeros_like(factors)
    _gradients(taps, values, factors, eps, grad_raw, grad_gamma, grad_beta)
    results = (grad_raw, raw), (grad_gamma, gamma), (grad_beta, gamma)
    first, second, third = (torch.from_numpy(array.reshape(like.shape)).to(like.dtype) for array, like in results)
    return first, second, third
