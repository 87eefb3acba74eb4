"""The dynamic convolution for CUDA, written in Triton.

It reads maps in their memory layout and sums in float32, or in float64 for float64 tensors.

A program processes a tile of patch tokens and a block of channels. The gradients of tokens and kernels read the
same values, so one kernel computes both in one pass. The kernel for 3 x 3 walks down the rows of its tile. It reads
a row three times, once per column of taps; the last two reads hit the cache. The kernel for other sizes reads the
map once per tap.

The padding is zeros. So a tap that is not finite affects the same outputs as in the reference backend. The sums for
the gradient of the kernels skip parts of the padding. If maps or gradients are not finite, the sums are not finite
either. At the border of a map, other taps may be affected than in the reference backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

_CHANNELS = 64  # per program
_TILE = 8, 8  # rows and columns per program
# For 3 x 3, the fastest on an H200: without and with the sums for the gradient of the kernels.
_COLUMNS = 16, 4
_WARPS = 4, 1
_PROGRAMS = 200, 400
_MIN_ROWS, _MAX_ROWS = 2, 16
MAX_GRID = 65_535  # CUDA's limit on programs along the second and the third axis of a grid

# Triton interprets annotations of kernel arguments as its own types, so the kernels have none for mypy.
# In detection the size of maps changes from step to step. do_not_specialize avoids a compilation for each size.


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
    of_sample,
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
    """Process one tile of one sample.

    ``filtering`` filters ``values`` (B, N, C) with the strided ``kernels`` and writes the result to ``out``.
    ``correlating`` multiplies what each tap sees by ``others`` (B, N, C) and writes the sums to ``parts``
    (B, tiles, K * K, C). ``flipped`` reverses the order of the taps in kernels and sums.
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
    if filtering:
        kernel = kernels + b * of_sample + c * of_channel
    if correlating:
        part = parts + (b * tiles + tile) * size * size * channels + c

    dtype: tl.constexpr = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros((rows * columns, block), dtype)
    if correlating:
        other = tl.load(others + sample + here, is_token[:, None] & is_channel, 0.0).to(dtype)
    for i in range(size):  # unroll only the inner loop; with both unrolled, large kernels compile for minutes
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
            _copy_prefix(values + sample + c, out + sample + c, prefix, channels, c < channels)


@triton.jit
def _copy_prefix(source, target, prefix, channels, is_channel):  # type: ignore[no-untyped-def]
    """Copy the prefix tokens of one sample, which pass through unchanged."""
    for token in range(prefix):
        tl.store(target + token * channels, tl.load(source + token * channels, is_channel), is_channel)


@triton.jit
def _tap(kernels, tap: tl.constexpr, of_tap, flipped: tl.constexpr, is_channel, dtype):  # type: ignore[no-untyped-def]
    """Load one tap of 3 x 3 kernels, (1, channels)."""
    index: tl.constexpr = 8 - tap if flipped else tap
    return tl.load(kernels + index * of_tap, is_channel, 0.0).to(dtype)[None, :]


@triton.jit
def _store_sum(parts, tap: tl.constexpr, sums, channels, flipped: tl.constexpr, is_channel):  # type: ignore[no-untyped-def]
    """Store the sums of one tap over all columns."""
    index: tl.constexpr = 8 - tap if flipped else tap
    tl.store(parts + index * channels, tl.sum(sums, axis=0), is_channel)


@triton.jit
def _load_row(row, is_row, left, middle, right, channels):  # type: ignore[no-untyped-def]
    """Load the values of one row for the three columns of taps, zero beyond the border."""
    return (
        tl.load(row - channels, left & is_row, 0.0),
        tl.load(row, middle & is_row, 0.0),
        tl.load(row + channels, right & is_row, 0.0),
    )


@triton.jit(do_not_specialize=['num_tokens', 'height', 'width', 'rows'])
def _convolve_3x3(  # type: ignore[no-untyped-def]
    values,
    kernels,
    others,
    out,
    parts,
    num_tokens,
    height,
    width,
    channels,
    of_sample,
    of_channel,
    of_tap,
    size: tl.constexpr,
    rows,
    columns: tl.constexpr,
    block: tl.constexpr,
    filtering: tl.constexpr,
    correlating: tl.constexpr,
    flipped: tl.constexpr,
):
    """Do what :func:`_convolve` does, row by row. Each input row contributes to three output rows."""
    b = tl.program_id(2).to(tl.int64)
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    across = tl.cdiv(width, columns)
    first = tile // across * rows
    last = tl.minimum(first + rows, height)
    w = tile % across * columns + tl.arange(0, columns)
    c = tl.program_id(1) * block + tl.arange(0, block)
    is_channel = c < channels
    sample = b * num_tokens * channels
    prefix = num_tokens - height * width
    start = sample + prefix * channels
    place = w[:, None] * channels + c[None, :]
    middle = (w < width)[:, None] & is_channel[None, :]
    left = (w >= 1)[:, None] & middle
    right = (w < width - 1)[:, None] & is_channel[None, :]

    dtype: tl.constexpr = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    if filtering:
        kernel = kernels + b * of_sample + c * of_channel
        k0 = _tap(kernel, 0, of_tap, flipped, is_channel, dtype)
        k1 = _tap(kernel, 1, of_tap, flipped, is_channel, dtype)
        k2 = _tap(kernel, 2, of_tap, flipped, is_channel, dtype)
        k3 = _tap(kernel, 3, of_tap, flipped, is_channel, dtype)
        k4 = _tap(kernel, 4, of_tap, flipped, is_channel, dtype)
        k5 = _tap(kernel, 5, of_tap, flipped, is_channel, dtype)
        k6 = _tap(kernel, 6, of_tap, flipped, is_channel, dtype)
        k7 = _tap(kernel, 7, of_tap, flipped, is_channel, dtype)
        k8 = _tap(kernel, 8, of_tap, flipped, is_channel, dtype)
        above = tl.zeros((columns, block), dtype)  # partial sums of the row above and of this row
        here = tl.zeros((columns, block), dtype)
    if correlating:
        s0 = tl.zeros((columns, block), dtype)
        s1 = tl.zeros((columns, block), dtype)
        s2 = tl.zeros((columns, block), dtype)
        s3 = tl.zeros((columns, block), dtype)
        s4 = tl.zeros((columns, block), dtype)
        s5 = tl.zeros((columns, block), dtype)
        s6 = tl.zeros((columns, block), dtype)
        s7 = tl.zeros((columns, block), dtype)
        s8 = tl.zeros((columns, block), dtype)
        # Separate zeros: Triton loses a variable that is assigned to another one with the same initial value.
        other_above = tl.zeros((columns, block), dtype)
        other_here = tl.zeros((columns, block), dtype)
        other_next = tl.load(others + start + first * width * channels + place, middle, 0.0)
    row = values + start + (first - 1) * width * channels + place
    is_row = first >= 1
    next0, next1, next2 = _load_row(row, is_row, left, middle, right, channels)
    for h in range(first - 1, last + 1):
        x0, x1, x2 = next0.to(dtype), next1.to(dtype), next2.to(dtype)
        # Prefetch the next row while this one is processed.
        row = values + start + (h + 1) * width * channels + place
        is_row = h + 1 < tl.minimum(last + 1, height)
        next0, next1, next2 = _load_row(row, is_row, left, middle, right, channels)
        if correlating:
            other_below = other_next.to(dtype)
            below = others + start + (h + 2) * width * channels + place
            other_next = tl.load(below, middle & (h + 2 < last), 0.0)
            s0 += other_below * x0
            s1 += other_below * x1
            s2 += other_below * x2
            s3 += other_here * x0
            s4 += other_here * x1
            s5 += other_here * x2
            s6 += other_above * x0
            s7 += other_above * x1
            s8 += other_above * x2
            other_above = other_here
            other_here = other_below
        if filtering:
            done = above + x0 * k6 + x1 * k7 + x2 * k8
            above = here + x0 * k3 + x1 * k4 + x2 * k5
            here = x0 * k0 + x1 * k1 + x2 * k2
            target = out + start + (h - 1) * width * channels + place
            tl.store(target, done.to(out.dtype.element_ty), middle & (h - 1 >= first))
    if correlating:
        part = parts + (b * tiles + tile) * 9 * channels + c
        _store_sum(part, 0, s0, channels, flipped, is_channel)
        _store_sum(part, 1, s1, channels, flipped, is_channel)
        _store_sum(part, 2, s2, channels, flipped, is_channel)
        _store_sum(part, 3, s3, channels, flipped, is_channel)
        _store_sum(part, 4, s4, channels, flipped, is_channel)
        _store_sum(part, 5, s5, channels, flipped, is_channel)
        _store_sum(part, 6, s6, channels, flipped, is_channel)
        _store_sum(part, 7, s7, channels, flipped, is_channel)
        _store_sum(part, 8, s8, channels, flipped, is_channel)
    if filtering and tile == 0:
        _copy_prefix(values + sample + c, out + sample + c, prefix, channels, is_channel)


def check_device(tensor: Tensor) -> None:
    """Raise a RuntimeError unless a tensor is on a CUDA device or Triton runs in interpreter mode."""
    if not tensor.is_cuda and not knobs.runtime.interpret:
        raise RuntimeError(f"backend 'triton' needs tensors on a CUDA device, got them on {tensor.device}")


def device_of(tensor: Tensor) -> AbstractContextManager:
    """Return the context in which to launch kernels on a tensor.

    Raises:
        RuntimeError: The tensor is not on a CUDA device.
    """
    check_device(tensor)
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def in_batches(count: int, *tensors: Tensor | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Split tensors (B, ...) into parts of at most ``count`` samples, which fit one grid. Tensors may be None."""
    batch = next(len(tensor) for tensor in tensors if tensor is not None)
    if batch <= count:
        yield tensors
        return
    for first in range(0, batch, count):
        yield tuple(None if tensor is None else tensor[first : first + count] for tensor in tensors)


def _rows(height: int, programs: int, wanted: int) -> int:
    """Choose the rows per tile: as many as leave enough programs to fill the device.

    ``programs`` is the number of programs per row of tiles.
    """
    rows = _MIN_ROWS
    while rows < _MAX_ROWS and programs * triton.cdiv(height, 2 * rows) >= wanted:
        rows *= 2
    return rows


def _launch(
    values: Tensor, kernels: Tensor | None, others: Tensor | None, size: int, height: int, width: int, flipped: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the filtered values if kernels are given, and the sums, (B, C, K, K), if others are given."""
    batch, num_tokens, channels = values.shape
    if num_tokens * channels >= 2**31:
        raise RuntimeError(
            f"backend 'triton' supports fewer than 2^31 values per sample, got {num_tokens} tokens of {channels} "
            "channels; use backend 'grouped'"
        )
    if channels > _CHANNELS * MAX_GRID:
        return _launch_by_channels(values, kernels, others, size, height, width, flipped)
    values = values.contiguous()
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, block)
    correlating = others is not None
    if size == 3:
        kernel, columns = _convolve_3x3, _COLUMNS[correlating]
        rows = _rows(height, batch * blocks * triton.cdiv(width, columns), _PROGRAMS[correlating])
    else:
        kernel, (rows, columns) = _convolve, _TILE
    tiles = triton.cdiv(height, rows) * triton.cdiv(width, columns)
    out = parts = None
    strides: tuple[int, ...] = (0, 0, 0)
    if kernels is not None:
        out, kernels = torch.empty_like(values), kernels.flatten(2)
        strides = kernels.stride()
    if others is not None:
        others = others.contiguous()
        # Without atomic additions, every run gives the same sum.
        dtype = torch.promote_types(values.dtype, torch.float32)
        parts = values.new_empty((batch, tiles, size * size, channels), dtype=dtype)
    with device_of(values):
        for tensors in in_batches(MAX_GRID, values, kernels, others, out, parts):
            some = tensors[0]
            assert some is not None
            kernel[tiles, blocks, len(some)](
                *tensors,
                num_tokens,
                height,
                width,
                channels,
                *strides,
                size=size,
                rows=rows,
                columns=columns,
                block=block,
                filtering=kernels is not None,
                correlating=correlating,
                flipped=flipped,
                num_warps=_WARPS[correlating],
            )
    sums = None if parts is None else parts.sum(dim=1).transpose(1, 2).unflatten(2, (size, size)).to(values.dtype)
    return out, sums


def _launch_by_channels(
    values: Tensor, kernels: Tensor | None, others: Tensor | None, *settings: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Do what :func:`_launch` does for more channels than one grid can hold. Channels are independent."""
    step = _CHANNELS * MAX_GRID
    results = []
    for first in range(0, values.shape[2], step):
        part = slice(first, first + step)
        some_kernels = None if kernels is None else kernels[:, part]
        some_others = None if others is None else others[:, :, part]
        results.append(_launch(values[:, :, part], some_kernels, some_others, *settings))
    filtered = [out for out, _ in results if out is not None]
    sums = [kernel for _, kernel in results if kernel is not None]
    return torch.cat(filtered, dim=2) if filtered else None, torch.cat(sums, dim=1) if sums else None


def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """Return the filtered tokens; see the package docstring."""
    out, _ = _launch(tokens, kernels, None, kernels.shape[-1], height, width, flipped=False)
    assert out is not None
    return out


def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """Return the gradient of the kernels; see the package docstring."""
    _, sums = _launch(tokens, None, grad, size, height, width, flipped=False)
    assert sums is not None
    return sums


def gradients(grad: Tensor, tokens: Tensor, kernels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and kernels; see the package docstring."""
    out, sums = _launch(grad, kernels, tokens, kernels.shape[-1], height, width, flipped=True)
    assert out is not None and sums is not None
    return out, sums
