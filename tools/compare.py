"""Compare PEFT methods on several tasks as a YAML file says; what is finished is not run again."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Collection
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from comparison import Board, Cell, Comparison, ComparisonError, load_comparison
from comparison_report import report
from experiments import ROOT, make_data, make_parser

COLUMNS = (
    TextColumn('{task.description}'),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn('left'),
    TimeRemainingColumn(),
)


class Sitting:
    """Runs cells side by side until none is left, or no more time.

    Args:
        board: What is finished.
        tasks: Names of the tasks to run.
        methods: Names of the methods to run.
        args: The command line.
        console: Where progress is shown.
    """

    def __init__(
        self,
        board: Board,
        tasks: Collection[str],
        methods: Collection[str],
        args: argparse.Namespace,
        console: Console,
    ) -> None:
        self.board = board
        self.selection = (tasks, methods)
        self.args = args
        self.console = console
        self.begun: set[str] = set()
        self.failed: list[str] = []
        self.running: dict[int, tuple[Cell, BaseProcess]] = {}
        self.context = get_context('forkserver')

    def run(self) -> None:
        """Run the cells.

        Raises:
            SystemExit: The user interrupted; runs that go on are ended.
        """
        start_fork_server_environment()
        self.context.set_forkserver_preload(['cell'])
        start = time.monotonic()
        # The whole time counts for what remains: cells take from seconds to minutes.
        with Progress(*COLUMNS, console=self.console, speed_estimate_period=1e6) as progress:
            bar = progress.add_task('runs', total=self.board.left(*self.selection))
            try:
                while True:
                    if self.args.minutes is None or time.monotonic() - start < 60 * self.args.minutes:
                        self._start_cells()
                    if not self.running:
                        break
                    for sentinel in wait(list(self.running)):
                        self._end_cell(*self.running.pop(sentinel))
                        done = len(self.begun) - len(self.running)
                        total = done - len(self.failed) + self.board.left(*self.selection)
                        progress.update(bar, completed=done, total=total)
            except KeyboardInterrupt:
                raise SystemExit('interrupted; what is finished is kept, and the same command goes on') from None
            finally:
                for _, process in self.running.values():
                    process.terminate()
                    process.join()

    def _start_cells(self) -> None:
        ready = [cell for cell in self.board.ready(*self.selection) if cell.name not in self.begun]
        for cell in ready[: self.args.jobs - len(self.running)]:
            self.begun.add(cell.name)
            job = (cell.settings, ROOT / cell.task.base, self._folder(cell), self.board.file(cell))
            process = self.context.Process(target=run_in_child, args=job)
            process.start()
            self.running[process.sentinel] = (cell, process)

    def _end_cell(self, cell: Cell, process: BaseProcess) -> None:
        process.join()
        self.board.refresh()
        if process.exitcode == 0 and cell.name in self.board.finished:
            self.console.print(f'{cell.name}: {describe(cell, self.board.finished[cell.name])}')
            return
        self.failed.append(cell.name)
        log_file = self._folder(cell) / 'output.log'
        tail = log_file.read_text(errors='replace').splitlines()[-15:] if log_file.is_file() else []
        message = f'{cell.name} failed with exit code {process.exitcode}; the end of {log_file}:'
        self.console.print('\n'.join([message, *tail]), style='red', markup=False, highlight=False)

    def _folder(self, cell: Cell) -> Path:
        return self.args.out / 'runs' / cell.name


def start_fork_server_environment() -> None:
    """What the fork server inherits: one thread a run, and this checkout's modules."""
    os.environ['OMP_NUM_THREADS'] = '1'
    paths = [str(ROOT), str(ROOT / 'tools'), os.environ.get('PYTHONPATH')]
    os.environ['PYTHONPATH'] = os.pathsep.join(path for path in paths if path)


def run_in_child(*job: Any) -> None:
    """Run a cell; its module, which imports all libraries, is for the child only."""
    from cell import run_cell

    run_cell(*job)


def describe(cell: Cell, content: dict) -> str:
    """One line on a finished cell."""
    if content['score'] is None:
        return 'diverged'
    task = cell.task
    return f'{task.title} {task.factor * content["score"]:.{task.digits}f}, {content["train_seconds"]:.0f} s'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__, 'work_dirs/compare')
    parser.add_argument('comparison', type=Path, help='YAML file, such as configs/comparison/small.yaml')
    parser.add_argument('--minutes', type=float, help='begin no run after so many minutes; the next call goes on')
    parser.add_argument('--tasks', nargs='+', metavar='TASK', help='run these tasks only (default: all)')
    parser.add_argument('--methods', nargs='+', metavar='METHOD', help='run these methods only (default: all)')
    parser.add_argument('--report-only', action='store_true', help='run nothing, report what is finished')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, got {args.jobs}')
    return args


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
    for name in tasks:
        task = comparison.tasks[name]
        if 'swin-scenes' in Path(task.config).name:
            options = json.dumps([task.options, task.search_options])
            # The configs' own scenes, unless the options name others.
            folders = {'data/scenes/target', *re.findall(r'data/scenes\w*/\w+', options)}
            for folder in sorted(folders):
                make_data(Path(folder), *(['--seed', '2'] if 'search' in folder else []))


def main() -> None:
    """Run the tool."""
    args = parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no run outlives the tool
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        comparison = load_comparison(args.comparison)
        board = Board(comparison, args.out / 'cells')
    except ComparisonError as error:
        raise SystemExit(f'error in the comparison: {error}') from None
    tasks = select('tasks', args.tasks, comparison.tasks)
    methods = select('methods', args.methods, comparison.methods)
    for name, keys in board.stale.items():
        console.print(f'{name} was finished with another {", ".join(keys)}: it counts no more and is run again')
    failed = []
    if not args.report_only:
        render_scenes(comparison, tasks)
        sitting = Sitting(board, tasks, methods, args, console)
        if board.left(tasks, methods):
            sitting.run()
        failed = sitting.failed
    report(board, args.out, console)
    left = board.left(tasks, methods)
    if left:
        console.print(f'{left} runs are left; the same command goes on with them')
    if failed:
        raise SystemExit(f'{len(failed)} runs failed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
