"""Time a batch whose images go through different adapters, against one adapter for all and against switching.

    python benchmarks/mixed_batch.py --out work_dirs/mixed_batch --rounds 3

Contestants predict on the same images with a whole classifier. Neighbouring images have different adapters:

- one adapter: all images in one batch, with one adapter. A server that knows one task does this.
- mixed, N adapters: all images in one batch. The time includes making the plan.
- by group, N adapters: the images of each adapter in one batch, after switching to it.
- one by one, N adapters: one image at a time, after switching to its adapter. A server without batching does this.

On the CPU with one thread, times are CPU seconds of the process, so that other load on the machine counts little.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from iconformer_mm import add_adapter, mixed, set_adapter
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
from step import CASES, Case, build, make_data

ONE = 'one adapter'
DEFAULT_CASES = ('vit-b', 'swin-t')
NUMBERS = (1, 4, 16, 64)


def contestants(
    case: Case, method: str, numbers: list[int], images: int, device: str, dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """Build a model with adapters, and return the calls that predict on the same images."""
    model = build(case, device)
    names = [f'adapter {i}' for i in range(max(numbers))]
    for name in names:
        add_adapter(model, name, method)
    model.eval()
    data = make_data(model, case, images, training=False)
    with torch.no_grad(), mixed(model, names[:1] * 2):  # warms up
        model(**{key: value[:2] for key, value in data.items()}, mode='predict')

    def predict(first: int, last: int, step: int = 1) -> None:
        part: dict[str, Any] = {key: value[first:last:step] for key, value in data.items()}
        with torch.no_grad(), precision(device, dtype):
            model(**part, mode='predict')

    def one() -> None:
        set_adapter(model, names[0])
        predict(0, images)

    def together(number: int) -> None:
        with mixed(model, [names[i % number] for i in range(images)]):
            predict(0, images)

    def by_group(number: int) -> None:
        for i in range(number):
            set_adapter(model, names[i])
            predict(i, images, number)

    def one_by_one(number: int) -> None:
        for i in range(images):
            set_adapter(model, names[i % number])
            predict(i, i + 1)

    calls: dict[str, Callable[[], None]] = {ONE: one}
    for number in numbers:
        calls[f'mixed, {number} adapters'] = partial(together, number)
    for number in numbers:
        if 1 < number < images:
            calls[f'by group, {number} adapters'] = partial(by_group, number)
    calls[f'one by one, {max(numbers)} adapters'] = partial(one_by_one, max(numbers))
    return calls


def measure_case(
    name: str, case: Case, args: argparse.Namespace, dtype: torch.dtype, progress: Progress
) -> list[dict[str, Any]]:
    """Measure a case. Return a row for each contestant."""
    calls = contestants(case, args.method, args.adapters, args.images, args.device, dtype)
    clock = time.process_time if args.device == 'cpu' and args.threads == 1 else time.perf_counter
    # Calls take seconds on the CPU, so they need no warm-up of their own.
    times = interleave(calls, args.rounds, progress, name, args.device, 0, clock, warm_up=args.device == 'cuda')
    last = list(calls)[-1]
    rows = rows_of(times, {'to one adapter': ONE, 'to one by one': last}, case=name)
    for row in rows:
        row['images/s'] = 1000 * args.images / row['ms']
    return rows


def main() -> None:
    """Run the benchmark."""
    cases = ('vit-s', 'vit-b', 'swin-t', 'swin-b')
    parser = make_parser(__doc__.partition('\n')[0], 'work_dirs/mixed_batch', cases, DEFAULT_CASES)
    parser.add_argument('--method', default='icon', help='PEFT method of all adapters (icon)')
    parser.add_argument('--images', type=int, default=64, help='images in a batch (64)')
    parser.add_argument(
        '--adapters', type=int, nargs='+', default=list(NUMBERS), metavar='N', help='numbers of adapters (1 4 16 64)'
    )
    args = parser.parse_args()
    if not 1 <= min(args.adapters) <= max(args.adapters) <= args.images:
        parser.error(f'--adapters must lie between 1 and --images ({args.images}), got {args.adapters}')
    prepare(args)
    rows: list[dict[str, Any]] = []
    with progress_bar() as progress:
        for name in args.cases:
            rows += measure_case(name, CASES[name], args, DTYPES[args.dtype], progress)
            columns = {
                'case': '',
                'contestant': '',
                'ms': '.1f',
                'to one adapter': '.3f',
                'to one by one': '.3f',
                'images/s': '.2f',
            }
            table = Table('one batch, many adapters', columns, rows)
            panel = Panel(table.name, series_of(rows, 'case', 'to one adapter'), 'time to one adapter', line=1)
            write_results(args.out, [table], settings_of(args), [panel])


if __name__ == '__main__':
    main()
