"""FilterNorm for CUDA, written in Triton: one launch forward and one backward instead of about forty.

The normalised kernels have their channels innermost in memory, as the dynamic convolution expects.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_backend import MAX_GRID, device_of, in_batches

_SAMPLES = 32  # per step

# Triton interprets annotations of kernel arguments as its own types, so the kernels have none for mypy.


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    raw, b, t, c, batch, channels, eps, size: tl.constexpr, dtype: tl.constexpr
):
    """Compute statistics of one channel's kernels, (samples, taps): mask, centred taps, their norm and their scale."""
    inside = (b < batch)[:, None] & (t < size * size)[None, :]
    taps = tl.load(raw + (b.to(tl.int64) * channels + c)[:, None] * size * size + t[None, :], inside, 0.0).to(dtype)
    mean = tl.sum(taps, axis=1) / (size * size)
    centred = tl.where(inside, taps - mean[:, None], 0.0)
    norm = tl.sqrt(tl.sum(centred * centred, axis=1))
    return inside, centred, norm, size / (norm + size * eps)


@triton.jit
def _normalise(  # type: ignore[no-untyped-def]
    raw, gamma, beta, out, batch, channels, eps, size: tl.constexpr, samples: tl.constexpr, taps: tl.constexpr
):
    """Normalise ``raw`` (B, C, K * K) with ``gamma`` and ``beta`` (C, K * K) into ``out`` (B, K * K, C)."""
    c = tl.program_id(0)
    b = tl.program_id(1) * samples + tl.arange(0, samples)
    t = tl.arange(0, taps)
    dtype: tl.constexpr = tl.float64 if raw.dtype.element_ty == tl.float64 else tl.float32
    inside, centred, norm, scale = _statistics(raw, b, t, c, batch, channels, eps, size, dtype)
    factor = tl.load(gamma + c * size * size + t, t < size * size, 0.0).to(dtype)
    added = tl.load(beta + c * size * size + t, t < size * size, 0.0).to(dtype)
    values = added[None, :] + factor[None, :] * scale[:, None] * centred
    place = (b.to(tl.int64)[:, None] * size * size + t[None, :]) * channels + c
    tl.store(out + place, values.to(out.dtype.element_ty), inside)


@triton.jit
def _differentiate(  # type: ignore[no-untyped-def]
    grad,
    raw,
    gamma,
    grad_raw,
    grad_gamma,
    grad_beta,
    batch,
    channels,
    of_sample,
    of_channel,
    of_tap,
    eps,
    size: tl.constexpr,
    samples: tl.constexpr,
    taps: tl.constexpr,
):
    """Compute the gradients of one channel over all samples. ``grad`` is strided."""
    c = tl.program_id(0)
    t = tl.arange(0, taps)
    dtype: tl.constexpr = tl.float64 if raw.dtype.element_ty == tl.float64 else tl.float32
    factor = tl.load(gamma + c * size * size + t, t < size * size, 0.0).to(dtype)
    sum_gamma, sum_beta = tl.zeros((taps,), dtype), tl.zeros((taps,), dtype)
    for first in range(0, batch, samples):
        b = first + tl.arange(0, samples)
        inside, centred, norm, scale = _statistics(raw, b, t, c, batch, channels, eps, size, dtype)
        place = b.to(tl.int64)[:, None] * of_sample + c * of_channel + t[None, :] * of_tap
        g = tl.load(grad + place, inside, 0.0).to(dtype)
        inner = g * factor[None, :]
        # The gradient through the norm; it is zero at zero.
        product = tl.sum(inner * centred, axis=1)
        through = product * scale * scale / (size * tl.where(norm > 0, norm, 1))
        mean = tl.sum(inner, axis=1) / (size * size)
        values = scale[:, None] * (inner - mean[:, None]) - through[:, None] * centred
        here = (b.to(tl.int64) * channels + c)[:, None] * size * size + t[None, :]
        tl.store(grad_raw + here, values.to(grad_raw.dtype.element_ty), inside)
        sum_gamma += tl.sum(g * scale[:, None] * centred, axis=0)
        sum_beta += tl.sum(g, axis=0)
    tl.store(grad_gamma + c * size * size + t, sum_gamma.to(grad_gamma.dtype.element_ty), t < size * size)
    tl.store(grad_beta + c * size * size + t, sum_beta.to(grad_beta.dtype.element_ty), t < size * size)


def _tile(raw: Tensor) -> dict[str, int]:
    size = raw.shape[-1]
    samples = min(_SAMPLES, triton.next_power_of_2(len(raw)))
    taps = triton.next_power_of_2(size * size)
    return dict(size=size, samples=samples, taps=taps, num_warps=1 if samples * taps <= 512 else 4)


def normalise(raw: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Return the normalised kernels, (B, C, K, K)."""
    batch, channels, size, _ = raw.shape
    raw, gamma, beta = raw.contiguous(), gamma.contiguous(), beta.contiguous()
    out = raw.new_empty((batch, size * size, channels))
    tile = _tile(raw)
    samples = tile['samples']
    with device_of(raw):
        for some, target in in_batches(samples * MAX_GRID, raw, out):
            assert some is not None
            _normalise[channels, triton.cdiv(len(some), samples)](
                some, gamma, beta, target, len(some), channels, eps, **tile
            )
    return out.unflatten(1, (size, size)).permute(0, 3, 1, 2)


def gradients(grad: Tensor, raw: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the raw kernels, (B, C, K, K), and of gamma and beta, (C, K, K)."""
    batch, channels = raw.shape[:2]
    raw, gamma, grad = raw.contiguous(), gamma.contiguous(), grad.flatten(2)
    results = torch.empty_like(raw), torch.empty_like(gamma), torch.empty_like(gamma)
    with device_of(raw):
        _differentiate[(channels,)](grad, raw, gamma, *results, batch, channels, *grad.stride(), eps, **_tile(raw))
    return results
