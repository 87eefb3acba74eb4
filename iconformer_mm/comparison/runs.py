"""The runs of a comparison, side by side, each in a process of its own."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Collection
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import iconformer_mm

from .experiments import ROOT
from .results import Board
from .spec import Cell

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
        self.running: dict[Any, tuple[Cell, BaseProcess]] = {}  # by sentinel
        self.context = get_context('forkserver')

    def run(self) -> None:
        """Run the cells.

        Raises:
            SystemExit: The user interrupted; runs that go on are ended.
        """
        start_fork_server_environment()
        self.context.set_forkserver_preload(['iconformer_mm.comparison.single_run'])
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
    """What the fork server inherits: one thread a run, and this package."""
    os.environ['OMP_NUM_THREADS'] = '1'
    paths = [str(Path(iconformer_mm.__file__).parents[1]), os.environ.get('PYTHONPATH')]
    os.environ['PYTHONPATH'] = os.pathsep.join(path for path in paths if path)


def run_in_child(*job: Any) -> None:
    """Run a cell; its module, which imports all libraries, is for the child only."""
    from .single_run import run_cell

    run_cell(*job)


def describe(cell: Cell, content: dict) -> str:
    """One line on a finished cell."""
    if content['score'] is None:
        return 'diverged'
    task = cell.task
    return f'{task.title} {task.factor * content["score"]:.{task.digits}f}, {content["train_seconds"]:.0f} s'
