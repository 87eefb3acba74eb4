"""The runs of a comparison, side by side, each in a process of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import iconformer_mm

from .results import Results
from .spec import ComparisonError, Run

COLUMNS = (
    TextColumn('{task.description}'),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn('left'),
    TimeRemainingColumn(),
)


class Scheduler:
    """Runs runs side by side until none is left, or no more time.

    Args:
        results: What is finished.
        tasks: Names of the tasks to run.
        methods: Names of the methods to run.
        jobs: How many at a time, one core each.
        minutes: After so many no run is begun; None for no limit.
        console: Where progress is shown.

    Raises:
        FetchError: The base of a task cannot be fetched.
    """

    def __init__(
        self,
        results: Results,
        tasks: Collection[str],
        methods: Collection[str],
        jobs: int,
        minutes: float | None,
        console: Console,
    ) -> None:
        self.results = results
        self.selection = (tasks, methods)
        self.jobs = jobs
        self.minutes = minutes
        self.console = console
        self.begun: set[str] = set()
        self.failed: list[str] = []
        self.running: dict[Any, tuple[Run, BaseProcess]] = {}  # by sentinel
        # Fetched once.
        self.bases = {task.name: task.base_file() for task in results.comparison.with_searched(tasks)}
        self.context = get_context('forkserver')

    def run(self) -> None:
        """Rehearse what was never run, and run the runs.

        Raises:
            ComparisonError: A rehearsal failed.
            SystemExit: The user interrupted; runs that go on are ended.
        """
        start_fork_server_environment()
        self.context.set_forkserver_preload(['iconformer_mm.comparison.rehearsal'])
        start = time.monotonic()
        # The whole time counts for what remains: runs take from seconds to minutes.
        with Progress(*COLUMNS, console=self.console, speed_estimate_period=1e6) as progress:
            try:
                self._rehearse(progress)
                bar = progress.add_task('runs', total=self.results.left(*self.selection))
                while True:
                    if self.minutes is None or time.monotonic() - start < 60 * self.minutes:
                        self._start_runs()
                    if not self.running:
                        break
                    for run, process in self._ended():
                        self._end_run(run, process)
                        done = len(self.begun) - len(self.running)
                        total = done - len(self.failed) + self.results.left(*self.selection)
                        progress.update(bar, completed=done, total=total)
            except KeyboardInterrupt:
                raise SystemExit('interrupted; what is finished is kept, and the same command goes on') from None
            finally:
                for _, process in self.running.values():
                    process.terminate()
                    process.join()

    def _rehearse(self, progress: Progress) -> None:
        """Rehearse a run of each kind that was never run."""
        waiting = self.results.untried(*self.selection)
        bar = progress.add_task('first steps', total=len(waiting))
        mistakes: dict[str, list[Run]] = {}
        while waiting or self.running:
            while waiting and len(self.running) < self.jobs:
                run = waiting.pop(0)
                self._start(run, rehearse_in_child, run.settings, self.bases[run.task.name], self.results.work_dir(run))
            for run, process in self._ended():
                progress.advance(bar)
                if process.exitcode != 0:
                    (last,) = log_tail(self.log_file(run), 1) or [f'exit code {process.exitcode}']
                    mistakes.setdefault(last, []).append(run)
        progress.remove_task(bar)
        if mistakes:
            lines = []
            for last, runs in mistakes.items():
                names = ', '.join(sorted(f'{run.task.name}/{run.method.name}' for run in runs))
                lines.append(f'{names}: {last} ({self.log_file(runs[0])})')
            raise ComparisonError('\n'.join(['the first step fails, so nothing was run', *sorted(lines)]))

    def log_file(self, run: Run) -> Path:
        """All output of a run, while it goes on and if it failed."""
        return self.results.work_dir(run) / 'output.log'

    def _start(self, run: Run, target: Callable[..., None], *args: Any) -> None:
        process = self.context.Process(target=target, args=args)
        process.start()
        self.running[process.sentinel] = (run, process)

    def _ended(self) -> Iterator[tuple[Run, BaseProcess]]:
        """Wait for a process to end."""
        for sentinel in wait(list(self.running)):
            run, process = self.running.pop(sentinel)
            process.join()
            yield run, process

    def _start_runs(self) -> None:
        ready = [run for run in self.results.ready(*self.selection) if run.name not in self.begun]
        for run in ready[: self.jobs - len(self.running)]:
            self.begun.add(run.name)
            first = run.seed == self.results.comparison.seeds[0] and not run.search
            pictures = run.task.pictures if first else ()
            files = (self.results.work_dir(run), self.results.file(run))
            job = (run.settings, self.bases[run.task.name], *files, first, pictures)
            self._start(run, run_in_child, *job)

    def _end_run(self, run: Run, process: BaseProcess) -> None:
        self.results.refresh()
        if process.exitcode == 0 and run.name in self.results.finished:
            self.console.print(f'{run.name}: {describe(run, self.results.finished[run.name])}')
            return
        self.failed.append(run.name)
        message = f'{run.name} failed with exit code {process.exitcode}; the end of {self.log_file(run)}:'
        self.console.print(
            '\n'.join([message, *log_tail(self.log_file(run), 15)]), style='red', markup=False, highlight=False
        )


def start_fork_server_environment() -> None:
    """What the fork server inherits: one thread a run, and this package."""
    os.environ['OMP_NUM_THREADS'] = '1'
    paths = [str(Path(iconformer_mm.__file__).parents[1]), os.environ.get('PYTHONPATH')]
    os.environ['PYTHONPATH'] = os.pathsep.join(path for path in paths if path)


def log_tail(log_file: Path, count: int) -> list[str]:
    """The last lines of a log that are not empty; none of a log that is not there."""
    lines = log_file.read_text(errors='replace').splitlines() if log_file.is_file() else []
    return [line for line in lines if line.strip()][-count:]


# The modules of the two import all libraries, and are for the child only.
def run_in_child(*job: Any) -> None:
    """Run a run."""
    from .single_run import train_and_validate

    explained(train_and_validate, *job)


def rehearse_in_child(*job: Any) -> None:
    """Rehearse a run."""
    from .rehearsal import rehearse

    explained(rehearse, *job)


def explained(function: Callable[..., None], *args: Any) -> None:
    """Call a function. The last line of its output is a user's mistake, in words, or that of a traceback.

    Raises:
        SystemExit: The user made a mistake.
    """
    from iconformer_mm.engine.mistakes import explain

    try:
        function(*args)
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        raise SystemExit(sentence.removeprefix('error: ')) from error


def describe(run: Run, content: dict) -> str:
    """One line on a finished run."""
    if content['score'] is None:
        return 'diverged'
    task = run.task
    return f'{task.title} {task.factor * content["score"]:.{task.digits}f}, {content["train_seconds"]:.0f} s'
