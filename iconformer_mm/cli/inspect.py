"""Show what a config would adapt, train and cost, before any training.

python tools/inspect_model.py CONFIG --peft icon --shape 512 512
python tools/inspect_model.py CONFIG --peft icon --gpus 4 --memory 24
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from iconformer_mm.analysis.inspection import Inspection, inspect_model
from iconformer_mm.analysis.plan import RESERVED_GIB, RESERVED_SHARE, Plan, plan_memory, settings_of
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import merge_options

from .errors import user_errors
from .parser import make_parser

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


def plan_of(plan: Plan) -> Table:
    """What fits on some GPUs."""
    table = Table(
        title=f'estimated memory on each of {plan.gpus} GPUs of {plan.memory_gib:g} GiB, {plan.batch} images on each',
        title_justify='left',
    )
    for column in ('strategy', 'frozen_dtype', 'with_cp'):
        table.add_column(column)
    for column in ('frozen (GiB)', 'trained (GiB)', 'an image (GiB)', 'in all (GiB)', 'most images'):
        table.add_column(column, justify='right')
    for way in plan.ways:
        numbers = (way.weights_gib, way.trained_gib, way.stored_gib, way.gib(plan.batch))
        style = 'bold' if way is plan.chosen else 'dim' if way.images < plan.batch else None
        name = str(way.frozen_dtype)
        table.add_row(
            way.strategy, name, str(way.with_cp), *(f'{n:,.2f}' for n in numbers), f'{way.images:,}', style=style
        )
    return table


def choice_of(plan: Plan) -> str:
    """The way that a plan chooses, in words."""
    note = (
        f'{plan.usable_gib:,.1f} GiB are counted on: {RESERVED_SHARE:.0%} and {RESERVED_GIB:g} GiB are left to CUDA '
        'and temporary tensors. What neck and head store is not in the estimate.'
    )
    if plan.chosen is None:
        most = max((way.images for way in plan.ways), default=0)
        return f'Nothing fits with {plan.batch} images on a GPU; the most is {most}. {note}'
    return f'First that fits: {"; ".join(settings_of(plan.chosen))}. {note}'


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser(__doc__.partition('\n')[0])
    parser.add_argument('--shape', nargs=2, type=int, default=(224, 224), help='height and width in pixels (224 224)')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--gpus', type=int, help='plan for this number of GPUs (1 if only --memory is given)')
    parser.add_argument('--memory', type=float, help='memory of each GPU in GiB, for a plan of what fits')
    parser.add_argument('--batch', type=int, help="images on each GPU, for a plan (the config's batch_size)")
    args = parser.parse_args(argv)
    if args.memory is None and (args.gpus is not None or args.batch is not None):
        parser.error('--gpus and --batch are for a plan, which needs the memory of a GPU: add --memory GIB')
    if min(args.shape) < 1:
        parser.error(f'--shape takes a height and a width in pixels, got {args.shape[0]} {args.shape[1]}')
    cfg = load_config(args.config, args.peft)
    merge_options(cfg, args.cfg_options)
    inspection = inspect_model(cfg, tuple(args.shape))
    plan = None
    if args.memory is not None:
        gpus = 1 if args.gpus is None else args.gpus
        plan = plan_memory(cfg, gpus, args.memory, tuple(args.shape), args.batch)
    if args.json:
        content = inspection.as_dict() if plan is None else {**inspection.as_dict(), 'plan': plan.as_dict()}
        print(json.dumps(content, indent=1))
        return
    console = Console()
    console.print(tree_of(inspection))
    print(inspection.summary)
    console.print(table_of(inspection))
    if inspection.prefix is not None:
        console.print(saving_of(inspection), highlight=False, markup=False)
    if plan is not None:
        console.print(plan_of(plan))
        console.print(choice_of(plan), highlight=False, markup=False)
    for mistake in inspection.mistakes:
        console.print(f'warning: {mistake}', style='yellow', highlight=False, markup=False)
    for dataset in inspection.unseen:
        console.print(f'not looked at, as it is not there: {dataset}', highlight=False, markup=False)
