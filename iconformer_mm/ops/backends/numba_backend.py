"""The dynamic convolution as CPU code compiled by Numba, which needs no C compiler.

The loops run in memory order with channels innermost, so that channels fill vector registers. The
number of channels is a compile-time constant. For 3 x 3 kernels the code computes two neighbouring
outputs at once. They share the nine taps and half of their inputs, and loads are the bottleneck.
Each thread processes a range of rows. The threads are our own: Numba's do not survive a fork and
do not follow ``torch.set_num_threads``.

The code does not read the padding. This is correct only for finite numbers, since zero times infinity
is NaN. If a kernel or its gradient is not finite, the reference backend computes the result instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch
from numba import njit
from torch import Tensor

from . import apart, reference_backend


def jitted(function: Callable) -> Callable:
    """Compile a function on its first call, and cache the code on disk if the disk is writable."""
    # Sums may be reordered. Infinities and NaN must survive, because loss scaling looks for them.
    options = dict(nogil=True, fastmath={'contract', 'nsz', 'reassoc'}, error_model='numpy')
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)


@jitted
def _sum_of_zeros(values: np.ndarray) -> float:
    """Sum zero times each value of (B, K * K, C). The result is NaN unless all values are finite."""
    batch, count, channels = values.shape
    zero = values.dtype.type(0)
    total = zero
    for b in range(batch):
        for t in range(count):
            for c in range(channels):
                total += values[b, t, c] * zero
    return total


def _by_definition(function: Callable[..., Tensor], first: Tensor, second: Tensor, *settings: int) -> Tensor:
    """Call a function of the reference backend in the precision of this backend."""
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return function(first.to(dtype), second.to(dtype), *settings).to(first.dtype)


@cache
def _functions(size: int, channels: int) -> tuple[Callable, Callable, Callable]:
    """Return the compiled functions for K and C. The last one supports K = 3 only.

    They process the half-open range of rows from ``first`` to ``last``, counted over all maps. Maps are
    (B, L), each from column ``start`` on. Kernels and their gradients are (B, K * K, C).
    """
    half = size // 2

    @jitted
    def correlate_3x3(
        x: np.ndarray, kernels: np.ndarray, out: np.ndarray, start: int, height: int, width: int, first: int, last: int
    ) -> None:
        length, pairs = width * channels, max(0, (width - 2) // 2)
        zeros = np.zeros(length, x.dtype)  # a row beyond the border
        for row in range(first, last):
            b, h = row // height, row % height
            here = start + h * length
            above = x[b, here - length : here] if h > 0 else zeros
            middle = x[b, here : here + length]
            below = x[b, here + length : here + 2 * length] if h < height - 1 else zeros
            k = kernels[b]
            y = out[b, here : here + length]
            for index in range(width - 2 * pairs):  # the unpaired columns: the first, and the last one or two
                w = index + 2 * pairs if index else 0
                s = w * channels
                target = y[s : s + channels]
                target[:] = 0
                for j in range(max(0, 1 - w), min(3, width + 1 - w)):
                    # Slices let the compiler rule out negative indices, so that it can vectorise.
                    near = slice(s + (j - 1) * channels, s + j * channels)
                    a, m, z = above[near], middle[near], below[near]
                    for c in range(channels):
                        target[c] += k[j, c] * a[c] + k[3 + j, c] * m[c] + k[6 + j, c] * z[c]
            for pair in range(pairs):
                for c in range(channels):
                    i0 = 2 * pair * channels + c
                    i1, i2, i3 = i0 + channels, i0 + 2 * channels, i0 + 3 * channels
                    k0, k1, k2 = k[0, c], k[1, c], k[2, c]
                    x1, x2 = above[i1], above[i2]
                    first_sum = k0 * above[i0] + k1 * x1 + k2 * x2
                    second_sum = k0 * x1 + k1 * x2 + k2 * above[i3]
                    k0, k1, k2 = k[3, c], k[4, c], k[5, c]
                    x1, x2 = middle[i1], middle[i2]
                    first_sum += k0 * middle[i0] + k1 * x1 + k2 * x2
                    second_sum += k0 * x1 + k1 * x2 + k2 * middle[i3]
                    k0, k1, k2 = k[6, c], k[7, c], k[8, c]
                    x1, x2 = below[i1], below[i2]
                    y[i1] = first_sum + k0 * below[i0] + k1 * x1 + k2 * x2
                    y[i2] = second_sum + k0 * x1 + k1 * x2 + k2 * below[i3]

    @jitted
    def correlate(
        x: np.ndarray, kernels: np.ndarray, out: np.ndarray, start: int, height: int, width: int, first: int, last: int
    ) -> None:
        length = width * channels
        for row in range(first, last):
            b, h = row // height, row % height
            here = start + h * length
            y = out[b, here : here + length]
            y[:] = 0
            for i in range(max(0, half - h), min(size, height + half - h)):
                there = here + (i - half) * length
                source = x[b, there : there + length]
                for j in range(size):
                    tap = kernels[b, i * size + j]
                    for w in range(max(0, half - j), min(width, width + half - j)):
                        s = w * channels
                        near = s + (j - half) * channels
                        # Slices let the compiler rule out negative indices, so that it can vectorise.
                        target, seen = y[s : s + channels], source[near : near + channels]
                        for c in range(channels):
                            target[c] += tap[c] * seen[c]

    @jitted
    def gradients_3x3(
        grad: np.ndarray,
        x: np.ndarray,
        kernels: np.ndarray,
        out: np.ndarray,
        sums: np.ndarray,
        start: int,
        height: int,
        width: int,
        first: int,
        last: int,
    ) -> None:
        """Compute both gradients from the same loads. ``kernels`` and ``sums`` are flipped."""
        length, pairs = width * channels, max(0, (width - 2) // 2)
        zeros = np.zeros(length, x.dtype)
        part = np.zeros((9, channels), x.dtype)
        for row in range(first, last):
            b, h = row // height, row % height
            here = start + h * length
            above = grad[b, here - length : here] if h > 0 else zeros
            middle = grad[b, here : here + length]
            below = grad[b, here + length : here + 2 * length] if h < height - 1 else zeros
            k = kernels[b]
            y = out[b, here : here + length]
            v = x[b, here : here + length]
            part[:] = 0  # summing each row separately keeps rounding errors small on large maps
            for index in range(width - 2 * pairs):  # the unpaired columns: the first, and the last one or two
                w = index + 2 * pairs if index else 0
                s = w * channels
                target, values = y[s : s + channels], v[s : s + channels]
                target[:] = 0
                for j in range(max(0, 1 - w), min(3, width + 1 - w)):
                    near = slice(s + (j - 1) * channels, s + j * channels)
                    a, m, z = above[near], middle[near], below[near]
                    for c in range(channels):
                        target[c] += k[j, c] * a[c] + k[3 + j, c] * m[c] + k[6 + j, c] * z[c]
                        part[j, c] += values[c] * a[c]
                        part[3 + j, c] += values[c] * m[c]
                        part[6 + j, c] += values[c] * z[c]
            for pair in range(pairs):
                for c in range(channels):
                    i0 = 2 * pair * channels + c
                    i1, i2, i3 = i0 + channels, i0 + 2 * channels, i0 + 3 * channels
                    v1, v2 = v[i1], v[i2]
                    x0, x1, x2, x3 = above[i0], above[i1], above[i2], above[i3]
                    k0, k1, k2 = k[0, c], k[1, c], k[2, c]
                    first_sum = k0 * x0 + k1 * x1 + k2 * x2
                    second_sum = k0 * x1 + k1 * x2 + k2 * x3
                    part[0, c] += v1 * x0 + v2 * x1
                    part[1, c] += v1 * x1 + v2 * x2
                    part[2, c] += v1 * x2 + v2 * x3
                    x0, x1, x2, x3 = middle[i0], middle[i1], middle[i2], middle[i3]
                    k0, k1, k2 = k[3, c], k[4, c], k[5, c]
                    first_sum += k0 * x0 + k1 * x1 + k2 * x2
                    second_sum += k0 * x1 + k1 * x2 + k2 * x3
                    part[3, c] += v1 * x0 + v2 * x1
                    part[4, c] += v1 * x1 + v2 * x2
                    part[5, c] += v1 * x2 + v2 * x3
                    x0, x1, x2, x3 = below[i0], below[i1], below[i2], below[i3]
                    k0, k1, k2 = k[6, c], k[7, c], k[8, c]
                    y[i1] = first_sum + k0 * x0 + k1 * x1 + k2 * x2
                    y[i2] = second_sum + k0 * x1 + k1 * x2 + k2 * x3
                    part[6, c] += v1 * x0 + v2 * x1
                    part[7, c] += v1 * x1 + v2 * x2
                    part[8, c] += v1 * x2 + v2 * x3
            sums[b] += part

    @jitted
    def kernel_gradient(
        grad: np.ndarray, x: np.ndarray, out: np.ndarray, start: int, height: int, width: int, first: int, last: int
    ) -> None:
        length = width * channels
        sums = np.zeros(channels, x.dtype)
        for row in range(first, last):
            b, h = row // height, row % height
            here = start + h * length
            g = grad[b, here : here + length]
            for i in range(max(0, half - h), min(size, height + half - h)):
                there = here + (i - half) * length
                source = x[b, there : there + length]
                for j in range(size):
                    sums[:] = 0
                    for w in range(max(0, half - j), min(width, width + half - j)):
                        s = w * channels
                        near = s + (j - half) * channels
                        values, seen = g[s : s + channels], source[near : near + channels]
                        for c in range(channels):
                            sums[c] += values[c] * seen[c]
                    out[b, i * size + j] += sums

    return correlate_3x3 if size == 3 else correlate, kernel_gradient, gradients_3x3


_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    """Drop the pool in a forked process, which inherits the pool without its threads."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, 'register_at_fork'):  # Windows has no fork
    os.register_at_fork(after_in_child=_forget_pool)


def _in_parallel(function: Callable[[int, int], None], rows: int, work: int) -> None:
    """Call ``function(first, last)`` for ranges of rows, one range per thread; ``work`` is the number of values."""
    global _pool, _pool_size
    # A thread pays off above some ten thousand values.
    parts = max(1, min(torch.get_num_threads(), rows, work // 2**15))
    if parts == 1:
        function(0, rows)
        return
    if _pool is None or _pool_size < parts - 1:
        _pool, _pool_size = ThreadPoolExecutor(parts - 1, thread_name_prefix='dynamic_conv'), parts - 1
    bounds = [rows * part // parts for part in range(parts + 1)]
    waiting = [_pool.submit(function, *bounds[part : part + 2]) for part in range(1, parts)]
    function(bounds[0], bounds[1])
    for future in waiting:
        future.result()


def check_device(tensor: Tensor) -> None:
    """Raise a RuntimeError unless a tensor is on the CPU."""
    if tensor.device.type != 'cpu':
        raise RuntimeError(f"backend 'numba' needs tensors on the CPU, got them on {tensor.device}")


# The code below uses NumPy views. Views by torch take longer than the arithmetic of a small map.


def to_array(tensor: Tensor, copy: bool = False) -> np.ndarray:
    """Convert a tensor to an array in float32 or float64.

    Pass ``copy=True`` for tensors that may be parameters. FSDP resizes the memory of parameters, and memory
    exported to NumPy cannot be resized.
    """
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.to(dtype, copy=copy).numpy()


def _flat(tensor: Tensor) -> np.ndarray:
    """Convert (B, N, C) to an array (B, N * C)."""
    return np.ascontiguousarray(to_array(tensor)).reshape(len(tensor), -1)


def _taps(kernels: Tensor, step: int = 1) -> np.ndarray:
    """Convert kernels (B, C, K, K) to an array (B, K * K, C). Step -1 flips them."""
    batch, channels, size, _ = kernels.shape
    taps = to_array(kernels, copy=True)[:, :, ::step, ::step].transpose(0, 2, 3, 1)
    return np.ascontiguousarray(taps).reshape(batch, size * size, channels)


def _like(tokens: Tensor, x: np.ndarray, start: int) -> tuple[Tensor, np.ndarray]:
    """Return an output tensor and a view of it as an array (B, N * C). Its prefix tokens are copied from ``x``."""
    # torch aligns memory to cache lines. NumPy does not.
    out = torch.empty(tokens.shape, dtype=torch.float64 if x.dtype == np.float64 else torch.float32)
    y = out.numpy().reshape(x.shape)
    y[:, :start] = x[:, :start]
    return out, y


def _total(parts: dict[int, np.ndarray]) -> np.ndarray:
    """Sum the threads' parts (B, K * K, C) in a fixed order, so that the result is deterministic."""
    ordered = [parts[first] for first in sorted(parts)]
    return sum(ordered[1:], ordered[0])


def _kernels(total: np.ndarray, size: int, step: int, dtype: torch.dtype) -> Tensor:
    """Convert (B, K * K, C) to kernels (B, C, K, K). Step -1 flips them."""
    kernels = np.ascontiguousarray(total[:, ::step]).reshape(len(total), size, size, -1)
    return torch.from_numpy(kernels.transpose(0, 3, 1, 2)).to(dtype)


def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """Return the filtered tokens; see the package docstring."""
    batch, num_tokens, channels = tokens.shape
    taps = _taps(kernels)
    if _sum_of_zeros(taps) != 0:
        return _by_definition(reference_backend.correlate, tokens, kernels, height, width)
    x = _flat(tokens)
    start = (num_tokens - height * width) * channels
    out, y = _like(tokens, x, start)
    compiled = _functions(kernels.shape[-1], channels)[0]

    def rows(first: int, last: int) -> None:
        compiled(x, taps, y, start, height, width, first, last)

    _in_parallel(rows, batch * height, x.size)
    return out.to(tokens.dtype)


def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """Return the gradient of the kernels, (B, C, K, K); see the package docstring."""
    batch, num_tokens, channels = tokens.shape
    g, x = _flat(grad), _flat(tokens)
    start = (num_tokens - height * width) * channels
    compiled = _functions(size, channels)[1]
    parts: dict[int, np.ndarray] = {}

    def rows(first: int, last: int) -> None:
        part = parts[first] = np.zeros((batch, size * size, channels), x.dtype)
        compiled(g, x, part, start, height, width, first, last)

    _in_parallel(rows, batch * height, x.size)
    total = _total(parts)
    if _sum_of_zeros(total) != 0:
        return _by_definition(reference_backend.kernel_gradient, grad, tokens, size, height, width)
    return _kernels(total, size, 1, tokens.dtype)


_gradients_apart = apart(correlate, kernel_gradient)


def gradients(grad: Tensor, tokens: Tensor, kernels: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and kernels; see the package docstring."""
    size = kernels.shape[-1]
    if size != 3:
        return _gradients_apart(grad, tokens, kernels, height, width)
    batch, num_tokens, channels = tokens.shape
    taps = _taps(kernels, step=-1)
    if _sum_of_zeros(taps) != 0:
        return _gradients_apart(grad, tokens, kernels, height, width)
    g, x = _flat(grad), _flat(tokens)
    start = (num_tokens - height * width) * channels
    out, y = _like(grad, g, start)
    compiled = _functions(size, channels)[2]
    parts: dict[int, np.ndarray] = {}

    def rows(first: int, last: int) -> None:
        part = parts[first] = np.zeros((batch, 9, channels), x.dtype)
        compiled(g, x, taps, y, part, start, height, width, first, last)

    _in_parallel(rows, batch * height, x.size)
    total = _total(parts)
    if _sum_of_zeros(total) != 0:
        grad_kernels = _by_definition(reference_backend.kernel_gradient, grad, tokens, size, height, width)
    else:
        grad_kernels = _kernels(total, size, -1, tokens.dtype)
    return out.to(tokens.dtype), grad_kernels
