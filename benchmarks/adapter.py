"""Time a single adapter, forward and backward, on the tokens of ViT-B and Swin-B.

python benchmarks/adapter.py --out work_dirs/adapter
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from iconformer_mm import adapters
from iconformer_mm.adapters import TokenGrid
from measure import (
    DTYPES,
    Panel,
    Table,
    interleave,
    make_parser,
    precision,
    prepare,
    progress_bar,
    rows_of,
    series_of,
    settings_of,
    write_results,
)

REFERENCE = 'AdaptFormer'
# With the defaults of the methods: a bottleneck of 64, except in Convpass (8) and LoRand (half the width).
ADAPTERS: dict[str, Callable[[int], adapters.Adapter]] = {
    'iCoN': adapters.ICoNAdapter,
    'icon-static': partial(adapters.ICoNAdapter, kernel='static'),
    REFERENCE: adapters.AdaptFormerAdapter,
    'Mona': adapters.MonaAdapter,
    'Houlsby': adapters.HoulsbyAdapter,
    'Convpass': adapters.ConvpassAdapter,
    'LoRand': adapters.LoRandAdapter,
}


@dataclass(frozen=True)
class Case:
    """Tokens of shape (B, N, d)."""

    batch: int
    grid: TokenGrid
    embed_dims: int

    def __str__(self) -> str:
        return f'{self.batch}x{self.grid.num_tokens}x{self.embed_dims}'


CASES = {
    'vit-b': Case(16, TokenGrid(14, 14, num_prefix_tokens=1), 768),
    'swin-b-stage1': Case(8, TokenGrid(56, 56), 128),
    'swin-b-stage2': Case(8, TokenGrid(28, 28), 256),
    'swin-b-stage3': Case(8, TokenGrid(14, 14), 512),
    'swin-b-stage4': Case(8, TokenGrid(7, 7), 1024),
}


def make_step(adapter: nn.Module, case: Case, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Make a forward and backward pass of an adapter, with gradients of its parameters and tokens."""
    adapter = adapter.to(device)
    shape = (case.batch, case.grid.num_tokens, case.embed_dims)
    tokens = torch.randn(shape, device=device, requires_grad=True)
    grad = torch.randn(shape, device=device)
    inputs = [tokens, *adapter.parameters()]

    def step() -> None:
        with precision(device, dtype):
            delta = adapter(tokens, case.grid)
        torch.autograd.grad(delta, inputs, grad.to(delta.dtype))

    return step


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__.partition('\n')[0], 'work_dirs/adapter', [*CASES], [*CASES])
    args = parser.parse_args()
    prepare(args)
    rows = []
    with progress_bar() as progress:
        for name in args.cases:
            case = CASES[name]
            steps = {
                key: make_step(make(case.embed_dims), case, args.device, DTYPES[args.dtype])
                for key, make in ADAPTERS.items()
            }
            times = interleave(steps, args.rounds, progress, name, args.device)
            rows += rows_of(times, {f'to {REFERENCE}': REFERENCE}, case=name, shape=str(case))

    columns = {'case': '', 'shape': '', 'contestant': '', 'ms': '.2f', f'to {REFERENCE}': '.3f'}
    series = series_of(rows, 'case', f'to {REFERENCE}')
    panel = Panel('an adapter, forward and backward', series, f'time to {REFERENCE}', line=1)
    write_results(args.out, [Table('times', columns, rows)], settings_of(args), [panel])


if __name__ == '__main__':
    main()
