"""The dynamic convolution as compiled CPU code, by Numba: no compiler on the user's machine is needed.

Maps are walked in memory order, channels innermost, so that they fill vector registers, and
their number is a constant of the code. For 3 x 3 kernels two neighbouring outputs are made at
once: they share the nine taps and half of their inputs, and loads are what limits it. One thread
does a run of rows; the threads are ours, since those of Numba neither survive a fork nor
follow ``torch.set_num_threads``.

The padding is not read, which is right for finite numbers only: zero times infinity is NaN. So where a
kernel, or the sum that is the gradient of one, is not finite, the reference computes instead.
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
    """Compile at the first call, and keep the code on disk where that can be written to."""
    # Sums may be reordered; infinities and NaN must still pass, as loss scaling looks for them.
    options = dict(nogil=True, fastmath={'contract', 'nsz', 'reassoc'}, error_model='numpy')
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)


@jitted
def _sum_of_zeros(values: np.ndarray) -> float:
    """Zero times each of (B, K * K, C), summed: NaN unless all are finite."""
    batch, count, channels = values.shape
    zero = values.dtype.type(0)
    total = zero
    for b in range(batch):
        for t in range(count):
            for c in range(channels):
                total += values[b, t, c] * zero
    return total


def _by_definition(function: Callable[..., Tensor], first: Tensor, second: Tensor, *settings: int) -> Tensor:
    """A function of the reference in the precision of this backend."""
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    return function(first.to(dtype), second.to(dtype), *settings).to(first.dtype)


@cache
def _functions(size: int, channels: int) -> tuple[Callable, Callable, Callable]:
    """The functions for K and C, the last for K = 3 only; they do rows first to last of all maps, one after another.

    Maps are (B, L), each from column ``start`` on; kernels and their gradient are (B, K * K, C).
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
            for index in range(width - 2 * pairs):  # the columns of no pair: the first, and the last or two
                w = index + 2 * pairs if index else 0
                s = w * channels
                target = y[s : s + channels]
                target[:] = 0
                for j in range(max(0, 1 - w), min(3, width + 1 - w)):
                    # Slices, whose indices are known not to count from the end: vectors need that.
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
                        # Slices, whose indices are known not to count from the end: vectors need that.
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
        """Both gradients, whose taps see the same; ``kernels`` and ``sums`` are flipped."""
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
            part[:] = 0  # a row is summed by itself first, which keeps rounding small on large maps
            for index in range(width - 2 * pairs):  # the columns of no pair: the first, and the last or two
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
    """A forked process has the pool, but not its threads."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, 'register_at_fork'):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget_pool)


def _in_parallel(function: Callable[[int, int], None], rows: int, work: int) -> None:
    """Call ``function(first, last)`` for parts of all rows, a part a thread; ``work`` is the number of values."""
    global _pool, _pool_size
    # A thread is worth its start from some ten thousand values on.
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


# Views are NumPy's below: those of torch take longer than the arithmetic of a small map.


def to_array(tensor: Tensor, copy: bool = False) -> np.ndarray:
    """A tensor as an array, in a precision that NumPy knows.

    What may be a parameter is to be copied: memory that NumPy has seen cannot be resized, as FSDP does with parameters.
    """
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return tensor.to(dtype, copy=copy).numpy()


def _flat(tensor: Tensor) -> np.ndarray:
    """(B, N, C) as an array (B, N * C)."""
    return np.ascontiguousarray(to_array(tensor)).reshape(len(tensor), -1)


def _taps(kernels: Tensor, step: int = 1) -> np.ndarray:
    """Kernels (B, C, K, K) as an array (B, K * K, C), with step -1 flipped."""
    batch, channels, size, _ = kernels.shape
    taps = to_array(kernels, copy=True)[:, :, ::step, ::step].transpose(0, 2, 3, 1)
    return np.ascontiguousarray(taps).reshape(batch, size * size, channels)


def _like(tokens: Tensor, x: np.ndarray, start: int) -> tuple[Tensor, np.ndarray]:
    """A tensor for what tokens become, and as an array (B, N * C); its prefix tokens are those of ``x``."""
    # torch aligns memory to cache lines, NumPy does not.
    out = torch.empty(tokens.shape, dtype=torch.float64 if x.dtype == np.float64 else torch.float32)
    y = out.numpy().reshape(x.shape)
    y[:, :start] = x[:, :start]
    return out, y


def _total(parts: dict[int, np.ndarray]) -> np.ndarray:
    """The sum of the threads' parts (B, K * K, C), the same whichever thread was first."""
    ordered = [parts[first] for first in sorted(parts)]
    return sum(ordered[1:], ordered[0])


def _kernels(total: np.ndarray, size: int, step: int, dtype: torch.dtype) -> Tensor:
    """(B, K * K, C) as kernels, with step -1 flipped."""
    kernels = np.ascontiguousarray(total[:, ::step]).reshape(len(total), size, size, -1)
    return torch.from_numpy(kernels.transpose(0, 3, 1, 2)).to(dtype)


def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """The filtered tokens; see the package."""
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
    """The gradient of the kernels, (B, C, K, K); see the package."""
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
    """The gradients of tokens and kernels; see the package."""
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
