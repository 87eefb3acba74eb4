"""Show what a config would adapt, train and cost, before any training.

python tools/inspect_model.py CONFIG --peft icon --shape 512 512
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from iconformer_mm.analysis.inspection import Inspection, inspect_model
from iconformer_mm.engine import load_config

from .errors import user_errors
from .parser import make_parser, merge_options

ROWS = {
    'gflop': 'forward pass of the backbone (GFLOP an image)',
    'stored_mib': 'stored for its backward pass (MiB an image)',
    'gradient_mib': 'gradients (MiB)',
    'optimizer_mib': "AdamW's state (MiB)",
    'checkpoint_mib': 'what was trained, as a file (MiB)',
}


def tree_of(inspection: Inspection) -> Tree:
    """The adapted modules; runs of alike ones are one line."""
    tree = Tree(f'adapted: {len(inspection.sites)} modules')
    for (folder, kind, count), run in groupby(
        inspection.sites, key=lambda site: (site[0].rpartition('.')[0], site[1], site[2])
    ):
        names = [name.rpartition('.')[2] for name, *_ in run]
        span = names[0] if len(names) == 1 else f'{names[0]} to {names[-1]}'
        place = f'{folder}.{span}' if folder else span
        tree.add(f'{place}: {len(names)} x {kind}, {count:,} parameters each')
    return tree


def table_of(inspection: Inspection) -> Table:
    """The costs beside those of full fine-tuning."""
    method = inspection.summary.method or 'full'
    table = Table(title='estimates', title_justify='left')
    table.add_column('')
    for title in (method, 'full fine-tuning', 'ratio'):
        table.add_column(title, justify='right')
    for field, title in ROWS.items():
        own, full = getattr(inspection.cost, field), getattr(inspection.full, field)
        table.add_row(title, f'{own:,.2f}', f'{full:,.2f}', f'{own / full:.3f}' if full else '-')
    return table


def saving_of(inspection: Inspection) -> str:
    """What a prefix cache would save, in words."""
    prefix = inspection.prefix
    assert prefix is not None
    share = prefix.gflop / inspection.cost.gflop if inspection.cost.gflop else 0
    return (
        f'frozen prefix: {prefix.blocks} of {prefix.all_blocks} blocks. With prefix_cache=dict(dir=..., views=...) the '
        f'forward pass of a step takes {prefix.gflop:,.2f} GFLOP an image ({share:.2f} of it), and the cache '
        f'{prefix.mib:,.2f} MiB an image and view, half of that in bfloat16'
    )


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser(__doc__.partition('\n')[0])
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), help='height and width in pixels (224 224)')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args(argv)
    if min(args.shape) < 1:
        parser.error(f'--shape takes a height and a width in pixels, got {args.shape[0]} {args.shape[1]}')
    cfg = load_config(args.config, args.peft)
    merge_options(cfg, args.cfg_options)
    inspection = inspect_model(cfg, tuple(args.shape))
    if args.json:
        print(json.dumps(inspection.as_dict(), indent=1))
        return
    console = Console()
    console.print(tree_of(inspection))
    print(inspection.summary)
    console.print(table_of(inspection))
    if inspection.prefix is not None:
        console.print(saving_of(inspection), highlight=False, markup=False)
    for mistake in inspection.mistakes:
        console.print(f'warning: {mistake}', style='yellow', highlight=False, markup=False)
    for dataset in inspection.unseen:
        console.print(f'not looked at, as it is not there: {dataset}', highlight=False, markup=False)
