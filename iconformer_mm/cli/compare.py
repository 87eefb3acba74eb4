"""Compare PEFT methods on several tasks as a YAML file says; what is finished is not run again."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from iconformer_mm.comparison.own_images import refuse_damaged_images
from iconformer_mm.comparison.results import Results
from iconformer_mm.comparison.runs import Scheduler
from iconformer_mm.comparison.spec import Comparison, ComparisonError, load_comparison
from iconformer_mm.comparison.tables import report
from iconformer_mm.datasets.scenes import write_scenes
from iconformer_mm.extras import MissingExtraError, require_extra

from .errors import user_errors
from .parser import Parser
from .report import main as write_report


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument('comparison', type=Path, help='YAML file, such as configs/comparison/small.yaml')
    parser.add_argument('--jobs', type=int, default=min(4, os.cpu_count() or 1), help='runs at a time, one core each')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/compare'), help='folder for all results')
    parser.add_argument('--minutes', type=float, help='begin no run after so many minutes; the next call goes on')
    parser.add_argument(
        '--tasks', nargs='+', metavar='TASK', help='run these tasks, and the searches for them (default: all)'
    )
    parser.add_argument('--methods', nargs='+', metavar='METHOD', help='run these methods only (default: all)')
    parser.add_argument('--seeds', type=int, metavar='N', help='take the first N seeds only (default: all)')
    parser.add_argument('--report-only', action='store_true', help='run nothing, report what is finished')
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
    return args


def take_seeds(comparison: Comparison, number: int | None) -> Comparison:
    """The comparison with its first seeds only.

    Args:
        comparison: The comparison.
        number: How many; None for all.

    Raises:
        SystemExit: There are not so many.
    """
    if number is None:
        return comparison
    if not 1 <= number <= len(comparison.seeds):
        raise SystemExit(f'--seeds must be from 1 to {len(comparison.seeds)}, which the comparison has, got {number}')
    return replace(comparison, seeds=comparison.seeds[:number])


def select(kind: str, names: list[str] | None, known: Collection[str]) -> Collection[str]:
    """The named ones, or all.

    Raises:
        SystemExit: A name is unknown.
    """
    for name in names or []:
        if name not in known:
            raise SystemExit(f"--{kind}: '{name}' is not in the comparison; it has {', '.join(known)}")
    return names or known


def render_scenes(comparison: Comparison, tasks: Collection[str]) -> None:
    """Render what tasks on scenes train and test on, and what the search validates on."""
    for task in comparison.with_searched(tasks):
        if '-scenes_' in Path(task.config).name:
            options = json.dumps([task.options, task.search_options])
            # The configs' own scenes, unless the options name others.
            folders = {'data/scenes/target', *re.findall(r'data/scenes\w*/\w+', options)}
            for folder in map(Path, sorted(folders)):
                if not folder.exists():
                    write_scenes(folder.parent, folder.name, seed=2 if 'search' in str(folder) else 0)


def write_page(folder: Path, console: Console) -> None:
    """Write the page of a comparison, ``report.html``, if the extra for it is installed."""
    try:
        require_extra('report', 'report.html')
    except MissingExtraError as error:
        console.print(str(error), markup=False)
        return
    write_report([str(folder)])
    console.print('open it in a browser')


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    require_extra('plot', 'the report of a comparison')
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no run outlives the tool
    try:
        compare(args, Console(width=None if sys.stdout.isatty() else 160))
    except ComparisonError as error:
        raise SystemExit(f'error in the comparison: {error}') from None


def compare(args: argparse.Namespace, console: Console) -> None:
    """Run what is left, and report.

    Args:
        args: The command line.
        console: Where progress and tables are shown.

    Raises:
        ComparisonError: The file of the comparison or of a run is wrong, or a first step fails.
        SystemExit: Runs failed, or the command line names what the comparison does not have.
    """
    comparison = take_seeds(load_comparison(args.comparison), args.seeds)
    results = Results(comparison, args.out)
    tasks = select('tasks', args.tasks, comparison.tasks)
    methods = select('methods', args.methods, comparison.methods)
    for name, keys in results.stale.items():
        console.print(f'{name} was finished with another {", ".join(keys)}: it counts no more and is run again')
    failed = []
    if not args.report_only:
        render_scenes(comparison, tasks)
        scheduler = Scheduler(results, tasks, methods, args.jobs, args.minutes, console)
        if results.left(tasks, methods):
            for task in comparison.with_searched(tasks):
                refuse_damaged_images(task.options)
            scheduler.run()
        failed = scheduler.failed
    report(results, args.out, console)
    write_page(args.out, console)
    left = results.left(tasks, methods)
    if left:
        console.print(f'{left} {"run is" if left == 1 else "runs are"} left; the same command goes on')
    if failed:
        raise SystemExit(f'{len(failed)} {"run" if len(failed) == 1 else "runs"} failed: {", ".join(failed)}')
