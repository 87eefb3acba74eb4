"""The dynamic convolution as compiled CPU code, by Numba: no compiler on the user's machine is needed.

Maps are walked in memory order, all taps of an output at once, channels
innermost, so that they fill vector registers; the nine neighbours of a row come from
the cache. One thread does a run of rows; the threads are ours, since those of
Numba neither survive a fork nor follow ``torch.set_num_threads``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numba import njit
from torch import Tensor

# Sums may be reordered; infinities and NaN must still pass, as loss scaling looks for them.
_compiled = njit(nogil=True, fastmath={'contract', 'nsz', 'reassoc'}, error_model='numpy', cache=True)


@_compiled
def _correlate_3x3(x, kernels, out, start, height, width, channels, first, last):
    """Rows first to last (of all maps, one after another) of a 3 x 3 correlation.

    x and out are (B, L), maps from column ``start`` on; kernels are (B, 9, C).
    Beyond the border stands a row of zeros.
    """
    length = width * channels
    zeros = np.zeros(length, x.dtype)
    edge = zeros[:channels]
    for row in range(first, last):
        b, h = row // height, row % height
        here = start + h * length
        above = x[b, here - length : here] if h > 0 else zeros
        middle = x[b, here : here + length]
        below = x[b, here + length : here + 2 * length] if h < height - 1 else zeros
        k = kernels[b]
        k0, k1, k2, k3, k4, k5, k6, k7, k8 = k[0], k[1], k[2], k[3], k[4], k[5], k[6], k[7], k[8]
        target = out[b, here : here + length]
        for w in range(width):
            s = w * channels
            e = s + channels
            x1, x4, x7 = above[s:e], middle[s:e], below[s:e]
            if w > 0:
                x0, x3, x6 = above[s - channels : s], middle[s - channels : s], below[s - channels : s]
            else:
                x0, x3, x6 = edge, edge, edge
            if w < width - 1:
                x2, x5, x8 = above[e : e + channels], middle[e : e + channels], below[e : e + channels]
            else:
                x2, x5, x8 = edge, edge, edge
            y = target[s:e]
            for c in range(channels):
                y[c] = (
                    k0[c] * x0[c]
                    + k1[c] * x1[c]
                    + k2[c] * x2[c]
                    + k3[c] * x3[c]
                    + k4[c] * x4[c]
                    + k5[c] * x5[c]
                    + k6[c] * x6[c]
                    + k7[c] * x7[c]
                    + k8[c] * x8[c]
                )


@_compiled
def _correlate(x, kernels, out, start, height, width, channels, first, last):
    """As :func:`_correlate_3x3`, for kernels (B, K * K, C) of any size, tap by tap."""
    size = int(np.sqrt(kernels.shape[1]))
    half = size // 2
    length = width * channels
    for row in range(first, last):
        b, h = row // height, row % height
        here = start + h * length
        target = out[b, here : here + length]
        target[:] = 0
        for i in range(max(0, half - h), min(size, height + half - h)):
            there = here + (i - half) * length
            source = x[b, there : there + length]
            for j in range(size):
                tap = kernels[b, i * size + j]
                for w in range(max(0, half - j), min(width, width + half - j)):
                    s = (w + j - half) * channels
                    values = source[s : s + channels]
                    y = target[w * channels : (w + 1) * channels]
                    for c in range(channels):
                        y[c] += tap[c] * values[c]


@_compiled
def _kernel_gradient(grad, x, out, size, start, height, width, channels, first, last):
    """Adds to out (B, K * K, C) what rows first to last of grad give.

    Three taps and four columns at a time, so that sums stay in registers; a row
    is summed by itself first, which keeps rounding small on large maps.
    """
    half = size // 2
    length = width * channels
    triples = (size + 2) // 3
    sums = np.zeros((3, channels), x.dtype)
    sum0, sum1, sum2 = sums[0], sums[1], sums[2]
    for row in range(first, last):
        b, h = row // height, row % height
        here = start + h * length
        g = grad[b, here : here + length]
        for i in range(max(0, half - h), min(size, height + half - h)):
            there = here + (i - half) * length
            values = x[b, there : there + length]
            for triple in range(triples):
                # Taps 3 * triple + (0, 1, 2); those beyond the kernel are summed and dropped.
                shift = 3 * triple - half
                sums[:] = 0
                w = 0
                while w < width:
                    s = w * channels
                    g0 = g[s : s + channels]
                    if w + shift >= 0 and w + max(shift + 5, 3) < width:
                        g1 = g[s + channels : s + 2 * channels]
                        g2 = g[s + 2 * channels : s + 3 * channels]
                        g3 = g[s + 3 * channels : s + 4 * channels]
                        s = (w + shift) * channels
                        x0, x1 = values[s : s + channels], values[s + channels : s + 2 * channels]
                        s += 2 * channels
                        x2, x3 = values[s : s + channels], values[s + channels : s + 2 * channels]
                        s += 2 * channels
                        x4, x5 = values[s : s + channels], values[s + channels : s + 2 * channels]
                        for c in range(channels):
                            sum0[c] += g0[c] * x0[c] + g1[c] * x1[c] + g2[c] * x2[c] + g3[c] * x3[c]
                            sum1[c] += g0[c] * x1[c] + g1[c] * x2[c] + g2[c] * x3[c] + g3[c] * x4[c]
                            sum2[c] += g0[c] * x2[c] + g1[c] * x3[c] + g2[c] * x4[c] + g3[c] * x5[c]
                        w += 4
                    else:
                        for j in range(3):
                            column = w + shift + j
                            if 0 <= column < width:
                                x0 = values[column * channels : (column + 1) * channels]
                                tap = sums[j]
                                for c in range(channels):
                                    tap[c] += g0[c] * x0[c]
                        w += 1
                for j in range(min(3, size - 3 * triple)):
                    tap = out[b, i * size + 3 * triple + j]
                    tap += sums[j]


_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def _forget_pool() -> None:
    """A forked process has the pool, but not its threads."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


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


def _as_array(tensor: Tensor) -> np.ndarray:
    """(B, N, C) as an array (B, N * C), in a precision that NumPy knows."""
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor.contiguous().flatten(1).numpy()


def correlate(tokens: Tensor, kernels: Tensor, height: int, width: int) -> Tensor:
    """The filtered tokens; see the package."""
    batch, num_tokens, channels = tokens.shape
    size = kernels.shape[-1]
    x = _as_array(tokens)
    taps = _as_array(kernels.flatten(2).transpose(1, 2)).reshape(batch, size * size, channels)
    y = np.empty_like(x)
    start = (num_tokens - height * width) * channels
    y[:, :start] = x[:, :start]
    compiled = _correlate_3x3 if size == 3 else _correlate

    def rows(first: int, last: int) -> None:
        compiled(x, taps, y, start, height, width, channels, first, last)

    _in_parallel(rows, batch * height, x.size)
    return torch.from_numpy(y).view(tokens.shape).to(tokens.dtype)


def kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int) -> Tensor:
    """The gradient of the kernels, (B, C, K, K); see the package."""
    batch, num_tokens, channels = tokens.shape
    g, x = _as_array(grad), _as_array(tokens)
    start = (num_tokens - height * width) * channels
    parts: dict[int, np.ndarray] = {}

    def rows(first: int, last: int) -> None:
        part = parts[first] = np.zeros((batch, size * size, channels), x.dtype)
        _kernel_gradient(g, x, part, size, start, height, width, channels, first, last)

    _in_parallel(rows, batch * height, x.size)
    # In order of the rows, so that a result does not depend on which thread was first.
    out = torch.from_numpy(sum(parts[first] for first in sorted(parts)))
    return out.view(batch, size, size, channels).permute(0, 3, 1, 2).to(tokens.dtype)
