"""Find a learning rate to begin with, by a range test: a short training at ever larger rates.

python tools/find_lr.py CONFIG --peft icon
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from iconformer_mm.analysis.lr_range_test import LRRangeTest, LRRangeTestHook, plot_lr_range_test, prepare_config
from iconformer_mm.engine import build_runner, exempt_from_collection, leave_process_group, load_config
from iconformer_mm.engine.config import method_of
from iconformer_mm.extras import require_extra
from iconformer_mm.files import write_json, written_whole

from .errors import user_errors
from .parser import guard, make_parser
from .train import merge_args

CURVES = ('rates', 'losses', 'smoothed')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__.partition('\n')[0])
    parser.add_argument('--min-lr', type=float, default=1e-6, help='learning rate of the first step (1e-6)')
    parser.add_argument('--max-lr', type=float, default=1.0, help='learning rate of the last step (1)')
    parser.add_argument('--iters', type=int, default=100, help='steps of the sweep (100)')
    parser.set_defaults(no_validate=True, auto_scale_lr=False, resume=None, base=None)
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def sweep(args: argparse.Namespace, console: Console) -> tuple[LRRangeTest, dict[str, Any], Path]:
    """Run the test; what it recorded, what it was run on, and the folder for its files."""
    cfg = load_config(args.config, args.peft)
    cfg.work_dir = f'{cfg.work_dir}_find-lr'
    merge_args(cfg, args)
    prepare_config(cfg, args.iters)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not is_main_process()) as progress:
        bar = progress.add_task('range test', total=args.iters)
        hook = LRRangeTestHook(args.min_lr, args.max_lr, args.iters, on_step=lambda: progress.advance(bar))
        runner = build_runner(cfg)
        exempt_from_collection()
        runner.register_hook(hook)
        runner.train()
    peft = method_of(cfg) or {}
    settings = dict(
        config=args.config,
        method=peft.get('methods') or peft.get('method'),
        optimizer=cfg.optim_wrapper.optimizer.to_dict(),
    )
    return hook.test, settings, Path(cfg.work_dir)


def report(test: LRRangeTest, settings: dict[str, Any], folder: Path, console: Console) -> None:
    """Print the suggestion, and write the curve and its plot."""
    suggestions = test.suggestions()
    # JSON knows no NaN, which is what a loss may end with.
    curves = {name: [x if math.isfinite(x) else None for x in getattr(test, name)] for name in CURVES}
    content = dict(settings, suggestions=suggestions, diverged=test.diverged, **curves)
    write_json(folder / 'find_lr.json', content)
    with written_whole(folder / 'find_lr.png') as temporary:
        plot_lr_range_test(test, temporary)
    end = f'{len(test.rates)} steps, {test.rates[0]:.2g} to {test.rates[-1]:.2g}'
    if suggestions:
        table = Table(title=f'learning rate ({end}{", where it diverged" if test.diverged else ""})')
        table.add_column('suggestion')
        table.add_column('rate', justify='right')
        for name, rate in suggestions.items():
            table.add_row(name, f'{rate:.2g}')
        console.print(table)
    else:
        console.print(f'no suggestion: the loss did not fall in {end}; try more --iters or another range')
    console.print(f'the config has {settings["optimizer"]["lr"]:g}; wrote find_lr.json and find_lr.png to {folder}')


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    require_extra('plot', 'the plot of a learning-rate range test')
    guard(args)
    console = Console(soft_wrap=True)
    test, settings, folder = sweep(args, console)
    if is_main_process():
        report(test, settings, folder, console)
    leave_process_group()
