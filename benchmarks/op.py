"""Time the dynamic convolution, forward and backward, against other implementations and against memory copies.

    python benchmarks/op.py --out work_dirs/op

On CUDA, the times are device times: the kernels that a contestant launches are recorded once and replayed.
"ms, launched" also includes Python, dispatch and autograd. A training step may or may not overlap that time with other
device work.

"copy bound" is the time to move the necessary data at the speed of a copy, which is measured in the same rounds. The
data are six tensors of the size of x. Forward reads x and writes the output. The gradient of x reads the output's
gradient and writes the gradient of x. The gradient of the kernels reads the output's gradient and x.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from iconformer_mm.ops import backends, dynamic_depthwise_conv2d
from measure import (
    DTYPES,
    Panel,
    Table,
    interleave,
    make_parser,
    prepare,
    progress_bar,
    ratio,
    replayed,
    rows_of,
    series_of,
    settings_of,
    write_results,
)

COPIED = 256 * 2**20  # bytes, far larger than any cache
MOVED = 6  # tensors of the size of x
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Shape:
    """Shape of maps x, (B, H, W, C), and kernels, (B, C, K, K)."""

    batch: int
    height: int
    width: int
    channels: int = 64
    size: int = 3

    @property
    def tokens(self) -> int:
        """B * H * W."""
        return self.batch * self.height * self.width

    def __str__(self) -> str:
        return f'{self.batch}x{self.height}x{self.width}x{self.channels}, K={self.size}'


CASES = {
    'vit-b-224': Shape(16, 14, 14),
    'vit-b-512': Shape(8, 32, 32),
    'swin-b-512-stage1': Shape(2, 128, 128),
    'swin-b-512-stage2': Shape(2, 64, 64),
    'swin-b-512-stage3': Shape(2, 32, 32),
    'swin-b-512-stage4': Shape(2, 16, 16),
    'swin-b-800x1333-stage1': Shape(2, 200, 334),
    'swin-b-800x1333-stage2': Shape(2, 100, 167),
    'swin-b-800x1333-stage3': Shape(2, 50, 84),
    'swin-b-800x1333-stage4': Shape(2, 25, 42),
    'swinv2-b-480x640-stage1': Shape(3, 120, 160),
    'swinv2-b-480x640-stage2': Shape(3, 60, 80),
    'swinv2-b-480x640-stage3': Shape(3, 30, 40),
    'swinv2-b-480x640-stage4': Shape(3, 15, 20),
    'vit-b-512-k1': Shape(8, 32, 32, size=1),
    'vit-b-512-k5': Shape(8, 32, 32, size=5),
    'vit-b-512-k7': Shape(8, 32, 32, size=7),
}
# Shapes that show how time grows with the map and with the batch, by case name.
GROWTH = {
    'growth-map': [Shape(1, *grid) for grid in ((14, 14), (28, 28), (56, 56), (112, 112), (200, 334))],
    'growth-batch': [Shape(batch, 32, 32) for batch in (1, 2, 4, 8, 16)],
}


def grouped(x: Tensor, kernels: Tensor) -> Tensor:
    """One convolution with B * C groups; the maps lie one after another in memory."""
    (batch, height, width, channels), size = x.shape, kernels.shape[-1]
    maps = x.permute(0, 3, 1, 2).reshape(1, batch * channels, height, width)
    out = F.conv2d(maps, kernels.reshape(-1, 1, size, size), padding=size // 2, groups=batch * channels)
    return out.view(batch, channels, height, width).permute(0, 2, 3, 1).contiguous()


def grouped_channels_last(x: Tensor, kernels: Tensor) -> Tensor:
    """One convolution with B * C groups; the channels of all samples are innermost in memory."""
    (batch, height, width, channels), size = x.shape, kernels.shape[-1]
    maps = x.permute(1, 2, 0, 3).reshape(1, height, width, batch * channels).permute(0, 3, 1, 2)
    out = F.conv2d(maps, kernels.reshape(-1, 1, size, size), padding=size // 2, groups=batch * channels)
    return out.permute(0, 2, 3, 1).view(height, width, batch, channels).permute(2, 0, 1, 3).contiguous()


def loop(x: Tensor, kernels: Tensor) -> Tensor:
    """One depth-wise convolution per sample."""
    channels, half = x.shape[3], kernels.shape[-1] // 2
    samples = x.permute(0, 3, 1, 2).split(1)
    out = [F.conv2d(one, k, padding=half, groups=channels) for one, k in zip(samples, kernels.unsqueeze(2))]
    return torch.cat(out).permute(0, 2, 3, 1).contiguous()


def shifted(x: Tensor, kernels: Tensor) -> Tensor:
    """The sum of K * K shifted maps, each multiplied by its tap."""
    (height, width), size = x.shape[1:3], kernels.shape[-1]
    half = size // 2
    padded = F.pad(x, (0, 0, half, half, half, half))
    out = torch.zeros_like(x)
    for index, tap in enumerate(kernels.flatten(2).unbind(2)):
        i, j = divmod(index, size)
        out = out + padded[:, i : i + height, j : j + width] * tap[:, None, None]
    return out


def ways(device: str, compiled: bool) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the contestants on a device, our backends last. Backends without their package are left out."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {'grouped convolution': grouped}
    if device == 'cuda':
        found['grouped convolution, channels last'] = grouped_channels_last
    else:
        found['loop over samples'] = loop
    found['shifted products'] = shifted
    if compiled:
        torch.compiler.reset()  # forget the shapes of other cases; compile for each shape
        found['shifted products, torch.compile'] = torch.compile(shifted, dynamic=False)
    for name in ('triton', 'grouped') if device == 'cuda' else ('numba', 'auto'):
        if name == 'auto' or backends.find(name) is not None:
            found[f'ours, {name}'] = partial(dynamic_depthwise_conv2d, backend=name)
    return found


class Problem:
    """Random inputs of a shape, and a contestant's forward and backward pass on them."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        maps = (shape.batch, shape.height, shape.width, shape.channels)
        self.x = torch.randn(maps, device=device, dtype=dtype, requires_grad=True)
        kernels = (shape.batch, shape.channels, shape.size, shape.size)
        self.kernels = torch.randn(kernels, device=device, dtype=dtype, requires_grad=True)
        self.grad = torch.randn(maps, device=device, dtype=dtype)

    def run(self, way: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output, the gradient of x and the gradient of the kernels."""
        out = way(self.x, self.kernels)
        grad_x, grad_kernels = torch.autograd.grad(out, (self.x, self.kernels), self.grad)
        return out, grad_x, grad_kernels

    def check(self, found: dict[str, Callable[[Tensor, Tensor], Tensor]]) -> None:
        """Check that all contestants compute the same result.

        Raises:
            RuntimeError: A contestant's result differs.
        """
        expected = self.run(shifted)
        for name, way in found.items():
            for got, right in zip(self.run(way), expected):
                error = torch.linalg.vector_norm((got - right).float()) / torch.linalg.vector_norm(right.float())
                if not error <= TOLERANCES[self.x.dtype]:
                    raise RuntimeError(f'{name} is off by {error:.1e} (relative) from shifted products')


def measure_case(
    name: str, shape: Shape, device: str, dtype: torch.dtype, compiled: bool, rounds: int, progress: Progress
) -> tuple[list[dict], dict]:
    """Measure the rows of a shape, and the row of the copies in the same rounds."""
    problem = Problem(shape, device, dtype)
    found = ways(device, compiled)
    problem.check(found)
    contestants: dict[str, Callable[[], object]] = {k: partial(problem.run, way) for k, way in found.items()}
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    target, copy = torch.empty_like(source), torch.empty_like(problem.grad)
    target.zero_()  # the first access allocates the memory
    contestants['copy'] = lambda: target.copy_(source)
    contestants['copy of own size'] = lambda: copy.copy_(problem.grad)
    launched: dict[str, list[float]] = {}
    if device == 'cuda':
        launched = interleave({key: contestants[key] for key in found}, rounds, progress, f'{name}, launched', device)
        contestants = {key: replayed(call) for key, call in contestants.items()}
    times = interleave(contestants, rounds, progress, name, device)

    own = problem.grad.nbytes
    large, small = times.pop('copy'), times.pop('copy of own size')
    # A copy reads and writes: it moves two tensors.
    bound = [MOVED * own / (2 * COPIED) * seconds for seconds in large]
    own_bound = [MOVED / 2 * seconds for seconds in small]
    references = {'to ours': 'ours, triton' if device == 'cuda' else 'ours, auto'}
    rows = rows_of(times, references, case=name, shape=str(shape))
    for row, other in zip(rows, rows_of(launched, references)):
        row['ms, launched'], row['to ours, launched'] = other['ms'], other['to ours']
    for row in rows:
        row['times the copy bound'] = ratio(row['seconds'], bound)
        row['of own size'] = ratio(row['seconds'], own_bound)
    copies = {
        'case': name,
        'MiB': own / 2**20,
        'GB/s': 1 / ratio(large, [2 * COPIED / 1e9] * rounds),
        'GB/s, own size': 1 / ratio(small, [2 * own / 1e9] * rounds),
        'seconds': large,
        'seconds, own size': small,
    }
    return rows, copies


def measure_growth(
    name: str, shapes: list[Shape], device: str, dtype: torch.dtype, rounds: int, progress: Progress
) -> list[dict]:
    """Measure the rows of growing shapes, with the default backend."""
    problems = {str(shape): Problem(shape, device, dtype) for shape in shapes}
    calls: dict[str, Callable[[], object]] = {
        key: partial(problem.run, dynamic_depthwise_conv2d) for key, problem in problems.items()
    }
    if device == 'cuda':
        calls = {key: replayed(call) for key, call in calls.items()}
    rows = rows_of(interleave(calls, rounds, progress, name, device), {}, case=name)
    for row, shape in zip(rows, shapes):
        row['tokens'] = shape.tokens
        row['ns a token'] = 1e6 * row['ms'] / shape.tokens
    return rows


def main() -> None:
    """Run the benchmark."""
    cases = [*CASES, *GROWTH]
    parser = make_parser(__doc__.partition('\n')[0], 'work_dirs/op', cases, cases)
    parser.add_argument('--compiled', action='store_true', help='also time shifted products with torch.compile')
    args = parser.parse_args()
    if args.compiled and not any(shutil.which(compiler) for compiler in ('c++', 'g++', 'clang++')):
        parser.error('--compiled: torch.compile needs a C++ compiler (c++, g++ or clang++), but none is installed')
    prepare(args)
    dtype = DTYPES[args.dtype]
    rows, copies, growth = [], [], []
    with progress_bar() as progress:
        for name in args.cases:
            if name in GROWTH:
                growth += measure_growth(name, GROWTH[name], args.device, dtype, args.rounds, progress)
                continue
            found, copy = measure_case(name, CASES[name], args.device, dtype, args.compiled, args.rounds, progress)
            rows += found
            copies.append(copy)

    tables, panels = [], []
    if rows:
        columns = {'case': '', 'shape': '', 'contestant': '', 'ms': '.3f', 'to ours': '.2f'}
        columns |= {'times the copy bound': '.2f', 'of own size': '.2f'}
        if args.device == 'cuda':
            columns |= {'ms, launched': '.3f', 'to ours, launched': '.2f'}
        tables.append(Table('times', columns, rows))
        tables.append(Table('copies', {'case': '', 'MiB': '.1f', 'GB/s': '.1f', 'GB/s, own size': '.1f'}, copies))
        series = series_of(rows, 'case', 'times the copy bound')
        panels.append(Panel('forward and backward', series, 'times the copy bound', log='y', line=1))
    if growth:
        columns = {'case': '', 'contestant': '', 'tokens': ',', 'ms': '.3f', 'ns a token': '.2f'}
        tables.append(Table('growth', columns, growth))
        series = {}
        for name in dict.fromkeys(row['case'] for row in growth):
            own = [row for row in growth if row['case'] == name]
            series[name] = ([row['tokens'] for row in own], [row['ns a token'] for row in own])
        panels.append(Panel('growth', series, 'ns a token', xlabel='tokens', log='xy'))
    write_results(args.out, tables, settings_of(args), panels)


if __name__ == '__main__':
    main()
