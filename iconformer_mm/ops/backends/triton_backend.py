"""The dynamic convolution for CUDA, by Triton: one pass over memory with the maps as they lie, sums in float32.

A program takes a run of patch tokens and a block of channels, and reads what each tap
sees; of these reads all but the first come from the caches.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

_ELEMENTS = 8192  # of a program's tile

# Triton takes annotations of a kernel's arguments for its own types, so these have none that mypy would know.


@triton.jit
def _neighbour(  # type: ignore[no-untyped-def]
    values, b, p, c, i, j, num_tokens, height, width, channels, size: tl.constexpr
):
    """What tap (i, j) of the kernels at patches p sees of channels c: zero beyond the border; float32 (float64)."""
    h = p // width + i - size // 2
    w = p % width + j - size // 2
    inside = (p < height * width) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
    token = (b * num_tokens + num_tokens - height * width + h * width + w)[:, None].to(tl.int64)
    out = tl.load(values + token * channels + c[None, :], inside[:, None] & (c < channels)[None, :], 0.0)
    return out if out.dtype == tl.float64 else out.to(tl.float32)


@triton.jit
def _correlate(  # type: ignore[no-untyped-def]
    tokens,
    kernels,
    out,
    num_tokens,
    height,
    width,
    channels,
    size: tl.constexpr,
    run: tl.constexpr,
    block: tl.constexpr,
):
    b = tl.program_id(2)
    p = tl.program_id(0) * run + tl.arange(0, run)
    c = tl.program_id(1) * block + tl.arange(0, block)
    kernel = kernels + b.to(tl.int64) * channels * size * size + c * size * size
    total = tl.zeros((run, block), tl.float64 if tokens.dtype.element_ty == tl.float64 else tl.float32)
    for i in range(size):  # only the inner loop is unrolled: with both, large kernels compile for minutes
        for j in tl.static_range(size):
            tap = tl.load(kernel + i * size + j, c < channels, 0.0).to(total.dtype)
            seen = _neighbour(tokens, b, p, c, i, j, num_tokens, height, width, channels, size)
            total += seen * tap[None, :]
    token = (b * num_tokens + num_tokens - height * width + p)[:, None].to(tl.int64)
    inside = (p < height * width)[:, None] & (c < channels)[None, :]
    tl.store(out + token * channels + c[None, :], total.to(out.dtype.element_ty), inside)


@triton.jit
def _kernel_gradient(  # type: ignore[no-untyped-def]
    grad, tokens, out, num_tokens, height, width, channels, size: tl.constexpr, run: tl.constexpr, block: tl.constexpr
):
    """Sums over one run of tokens; out is (B, runs, K * K, C)."""
    b = tl.program_id(2)
    p = tl.program_id(0) * run + tl.arange(0, run)
    c = tl.program_id(1) * block + tl.arange(0, block)
    g = _neighbour(grad, b, p, c, size // 2, size // 2, num_tokens, height, width, channels, size)
    part = (b * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * size * size
    for i in range(size):
        for j in tl.static_range(size):
            seen = _neighbour(tokens, b, p, c, i, j, num_tokens, height, width, channels, size)
            tl.store(out + (part + i * size + j) * channels + c, tl.sum(g * seen, axis=0), c < channels)


def _launch(kernel: triton.JITFunction, *tensors: Tensor, size: int, height: int, width: int, run: int) -> None:
    tokens = tensors[0]
    if not tokens.is_cuda and not knobs.runtime.interpret:
        raise RuntimeError(f"backend 'triton' needs tensors on a CUDA device, got them on {tokens.device}")
    batch, num_tokens, channels = tokens.shape
    block = _ELEMENTS // run
    grid = (triton.cdiv(height * width, run), triton.cdiv(channels, block), batch)
    with torch.cuda.device(tokens.device) if tokens.is_cuda else nullcontext():
        kernel[grid](*tensors, num_tokens, height, width, channels, size=size, run=run, block=block, num_warps=8)


def _run(channels: int) -> int:
    """Tokens of a program, so that with all channels, or 64 of them, its tile has ``_ELEMENTS``."""
    return _ELEMENTS // min(64, triton.next_power_of_2(channels))


def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """The filtered tokens; see the package."""
    tokens, kernels = tokens.contiguous(), kernels.contiguous()
    out = torch.empty_like(tokens)
    prefix = tokens.shape[1] - height * width
    if prefix:
        out[:, :prefix] = tokens[:, :prefix]
    run = _run(tokens.shape[2])
    _launch(_correlate, tokens, kernels, out, size=kernels.shape[-1], height=height, width=width, run=run)
    return out


def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """The gradient of the kernels; see the package."""
    grad, tokens = grad.contiguous(), tokens.contiguous()
    batch, _, channels = tokens.shape
    run = _run(channels)
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    # No atomic additions: the same sum in every run.
    parts = tokens.new_empty(batch, triton.cdiv(height * width, run), size * size, channels, dtype=dtype)
    _launch(_kernel_gradient, grad, tokens, parts, size=size, height=height, width=width, run=run)
    return parts.sum(dim=1).transpose(1, 2).unflatten(2, (size, size)).to(tokens.dtype)
