"""The dynamic convolution for CUDA, by Triton: maps as they lie in memory, sums in float32.

A program takes a tile of patch tokens and a block of channels, and reads what each tap sees; of
these reads all but the first come from the caches. The gradients of tokens and kernels
look at the same values, so one kernel makes both in one pass.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

_ROWS, _COLUMNS, _CHANNELS = 8, 16, 64  # of a program's tile
_WARPS = 8

# Triton takes annotations of a kernel's arguments for its own types, so these have none that mypy would know.


# The size of maps changes from step to step in detection: no code for each.
@triton.jit(do_not_specialize=['num_tokens', 'height', 'width'])
def _convolve(  # type: ignore[no-untyped-def]
    values,
    kernels,
    others,
    out,
    parts,
    num_tokens,
    height,
    width,
    channels,
    of_channel,
    of_tap,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    block: tl.constexpr,
    filtering: tl.constexpr,
    correlating: tl.constexpr,
    flipped: tl.constexpr,
):
    """One tile of one sample.

    ``filtering`` writes values (B, N, C) filtered with kernels (B, C, K * K) to ``out``, ``correlating`` sums
    of what a tap sees times others (B, N, C) to ``parts`` (B, tiles, K * K, C); ``flipped`` has both kernels
    and sums in the opposite order.
    """
    b = tl.program_id(2).to(tl.int64)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    across = tl.cdiv(width, columns)
    t = tl.arange(0, rows * columns)
    h = tile // across * rows + t // columns
    w = tile % across * columns + t % columns
    c = tl.program_id(1) * block + tl.arange(0, block)
    is_channel = (c < channels)[None, :]
    is_token = (h < height) & (w < width)
    prefix = num_tokens - height * width
    sample = b * num_tokens * channels
    here = (prefix + h * width + w)[:, None] * channels + c[None, :]

    dtype: tl.constexpr = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((rows * columns, block), dtype)
    if filtering:
        kernel = kernels + b * channels * size * size + c * of_channel
    if correlating:
        part = parts + (b * tiles + tile) * size * size * channels + c
        other = tl.load(others + sample + here, is_token[:, None] & is_channel, 0.0).to(dtype)
    for i in range(size):  # only the inner loop is unrolled: with both, large kernels compile for minutes
        for j in tl.static_range(size):
            up, left = i - size // 2, j - size // 2
            # Zero beyond the border.
            is_seen = is_token & (h + up >= 0) & (h + up < height) & (w + left >= 0) & (w + left < width)
            there = here + (up * width + left) * channels
            seen = tl.load(values + sample + there, is_seen[:, None] & is_channel, 0.0).to(dtype)
            tap = size * size - 1 - i * size - j if flipped else i * size + j
            if filtering:
                total += seen * tl.load(kernel + tap * of_tap, c < channels, 0.0).to(dtype)[None, :]
            if correlating:
                tl.store(part + tap * channels, tl.sum(seen * other, axis=0), c < channels)
    if filtering:
        tl.store(out + sample + here, total.to(out.dtype.element_ty), is_token[:, None] & is_channel)
        if tile == 0:
            for token in range(prefix):
                copied = tl.load(values + sample + token * channels + c, c < channels)
                tl.store(out + sample + token * channels + c, copied, c < channels)


def _launch(
    values: Tensor, kernels: Tensor | None, others: Tensor | None, size: int, height: int, width: int, flipped: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The filtered values, if there are kernels, and the sums with others, (B, C, K, K), if there are others."""
    if not values.is_cuda and not knobs.runtime.interpret:
        raise RuntimeError(f"backend 'triton' needs tensors on a CUDA device, got them on {values.device}")
    values = values.contiguous()
    batch, num_tokens, channels = values.shape
    tiles = triton.cdiv(height, _ROWS) * triton.cdiv(width, _COLUMNS)
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    out = parts = None
    strides = (0, 0)
    if kernels is not None:
        out = torch.empty_like(values)
        # Taps of neighbouring channels side by side, as their values are.
        kernels = kernels.flatten(2).transpose(1, 2).contiguous()
        strides = (1, channels)
    if others is not None:
        others = others.contiguous()
        # No atomic additions: the same sum in every run.
        dtype = torch.promote_types(values.dtype, torch.float32)
        parts = values.new_empty((batch, tiles, size * size, channels), dtype=dtype)
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        _convolve[(tiles, triton.cdiv(channels, block), batch)](
            values,
            kernels,
            others,
            out,
            parts,
            num_tokens,
            height,
            width,
            channels,
            *strides,
            size=size,
            rows=_ROWS,
            columns=_COLUMNS,
            block=block,
            filtering=kernels is not None,
            correlating=others is not None,
            flipped=flipped,
            num_warps=_WARPS,
        )
    sums = None if parts is None else parts.sum(dim=1).transpose(1, 2).unflatten(2, (size, size)).to(values.dtype)
    return out, sums


def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """The filtered tokens; see the package."""
    return _launch(tokens, kernels, None, kernels.shape[-1], height, width, flipped=False)[0]


def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """The gradient of the kernels; see the package."""
    return _launch(tokens, None, grad, size, height, width, flipped=False)[1]


def gradients(grad: Tensor, tokens: Tensor, kernels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The gradients of tokens and kernels; see the package."""
    return _launch(grad, kernels, tokens, kernels.shape[-1], height, width, flipped=True)
