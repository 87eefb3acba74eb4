"""Many training runs side by side: what the comparing tools share."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
TRAIN = ROOT / 'tools' / 'train.py'


@dataclass(frozen=True)
class Run:
    """One training run, in a process of its own.

    Attributes:
        config: Config file.
        folder: Its work directory; what was there is removed.
        options: Settings that override the config's, as ``key=value``.
    """

    config: Path
    folder: Path
    options: tuple[str, ...] = ()

    def execute(self) -> None:
        """Train and test on one core, with the output in ``output.log``.

        Raises:
            RuntimeError: The process failed; the message ends with its last lines.
        """
        command = [sys.executable, TRAIN, self.config, '--work-dir', self.folder]
        if self.options:
            command += ['--cfg-options', *self.options]
        environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        log_file = self.folder / 'output.log'
        with open(log_file, 'w') as log:
            code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        if code != 0:
            tail = '\n'.join(log_file.read_text().splitlines()[-15:])
            raise RuntimeError(f'{self.config.name} failed in {self.folder}; the end of {log_file}:\n{tail}')

    def scalars(self) -> list[dict]:
        """What mmengine's logger wrote, a dictionary a line; the last holds the metrics of the test."""
        (path,) = self.folder.glob('*/vis_data/scalars.json')
        return [json.loads(line) for line in path.read_text().splitlines()]

    def train_seconds(self) -> float:
        """Seconds spent in training steps, by the log."""
        steps = [line for line in self.scalars() if 'loss' in line]
        return sum(line['time'] for line in steps) / len(steps) * max(line['step'] for line in steps)

    def checkpoint(self) -> Path:
        """The one checkpoint of the run."""
        (path,) = [*self.folder.glob('epoch_*.pth'), *self.folder.glob('iter_*.pth')]
        return path


def execute_all(runs: Sequence[Run], workers: int, console: Console, describe: Callable[[Run], str]) -> None:
    """Execute runs, some at a time, under a progress bar.

    Args:
        runs: The runs, the slowest best first, so that no core idles at the end.
        workers: How many at a time.
        console: Where progress is shown.
        describe: Gives one line on a run that has ended.

    Raises:
        SystemExit: A run failed, or the user interrupted; runs that have not
            begun are cancelled.
    """
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(workers) as pool:
        bar = progress.add_task('runs', total=len(runs))
        futures = {pool.submit(run.execute): run for run in runs}
        try:
            for future in as_completed(futures):
                future.result()
                console.print(describe(futures[future]))
                progress.advance(bar)
        except (RuntimeError, KeyboardInterrupt) as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise SystemExit(str(error)) from None


def check_frozen(runs: Iterable[Run], base: Path) -> None:
    """Compare the backbone weights in the runs' checkpoints with the base's, bit by bit.

    Raises:
        RuntimeError: A tensor changed, or a checkpoint has none of the base's.
    """
    weights = {name.removeprefix('backbone.'): value for name, value in load_file(base).items()}
    for run in runs:
        path = run.checkpoint()
        state = torch.load(path, map_location='cpu', weights_only=False)['state_dict']
        # A backbone may lack some: the norms of stages that its head does not read.
        names = [name for name in weights if f'backbone.{name}' in state]
        if not names:
            raise RuntimeError(f'{path} holds none of the weights of {base}')
        for name in names:
            if not torch.equal(weights[name], state[f'backbone.{name}']):
                raise RuntimeError(f'{path}: the frozen tensor backbone.{name} changed in training')


def to_markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left and the others to the right."""
    lines = ['| ' + ' | '.join(titles) + ' |', '|---' + '|---:' * (len(titles) - 1) + '|']
    lines += ['| ' + ' | '.join(row) + ' |' for row in rows]
    return '\n'.join(lines) + '\n'
