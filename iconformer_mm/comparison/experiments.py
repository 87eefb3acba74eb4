"""Many training runs side by side: what the comparing tools share."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file

from iconformer_mm.checkpoint.reading import read_checkpoint
from iconformer_mm.cli.parser import Parser
from iconformer_mm.compat import config_folder

ROOT = config_folder('iconformer_mm').parent  # the checkout; of an installed package its .mim
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
        command = [sys.executable, str(TRAIN), str(self.config), '--work-dir', str(self.folder)]
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


def load_base(path: Path) -> dict[str, torch.Tensor]:
    """Read the pre-trained weights of a backbone, by their names in it."""
    return {name.removeprefix('backbone.'): value for name, value in load_file(path).items()}


def check_tensors(weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], where: object) -> None:
    """Compare a backbone's tensors with the base's, bit by bit.

    Args:
        weights: The base's tensors; those that the backbone lacks are left out.
        state: The backbone's.
        where: What the backbone's are from, for the message.

    Raises:
        RuntimeError: A tensor changed, or there is none to compare.
    """
    # A backbone may lack some: the norms of stages that its head does not read.
    names = [name for name in weights if name in state]
    if not names:
        raise RuntimeError(f'{where}: there are none of the weights of the base')
    for name in names:
        if not torch.equal(weights[name], state[name]):
            raise RuntimeError(f'{where}: the frozen tensor backbone.{name} changed in training')


def check_frozen(runs: Iterable[Run], base: Path) -> None:
    """Compare the backbone weights in the runs' checkpoints with the base's, bit by bit.

    Raises:
        RuntimeError: A tensor changed, or a checkpoint has none of the base's.
    """
    weights = load_base(base)
    for run in runs:
        path = run.checkpoint()
        state = read_checkpoint(path)['state_dict']
        prefix = 'backbone.'
        check_tensors(weights, {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}, path)


def make_parser(description: str, out: str) -> argparse.ArgumentParser:
    """The command line that the comparing tools have in common.

    Args:
        description: What the tool does.
        out: Default of its folder.
    """
    parser = Parser(description=description)
    parser.add_argument('--jobs', type=int, default=min(4, os.cpu_count() or 1), help='runs at a time, one core each')
    parser.add_argument('--out', type=Path, default=Path(out), help='folder for all results')
    return parser


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What a tool takes whose runs are set on the command line."""
    parser.add_argument('--seeds', type=int, default=3, help='runs of each (default: 3)')
    parser.add_argument('--cfg-options', nargs='*', default=[], help='settings for every run, as in train.py')


def make_data(folder: Path, *options: str) -> None:
    """Render the scenes of one style unless they are there.

    Args:
        folder: Their folder, named as the style.
        *options: Further options of ``make_scenes.py``.
    """
    if not folder.exists():
        command = [sys.executable, str(ROOT / 'tools' / 'dataset_converters' / 'make_scenes.py')]
        subprocess.run([*command, '--out', str(folder.parent), '--styles', folder.name, *options], check=True)


def print_table(title: str, titles: Sequence[Sequence[str]], rows: Iterable[Sequence[str]], console: Console) -> None:
    """Print a table, first column to the left and the others to the right.

    Args:
        title: Title of the table.
        titles: Lines of each column's title.
        rows: The cells.
        console: Where to.
    """
    table = Table(title=title, title_justify='left', box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for index, words in enumerate(titles):
        table.add_column('\n'.join(words), justify='right' if index else 'left', no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def to_markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left and the others to the right."""
    lines = ['| ' + ' | '.join(titles) + ' |', '|---' + '|---:' * (len(titles) - 1) + '|']
    lines += ['| ' + ' | '.join(row) + ' |' for row in rows]
    return '\n'.join(lines) + '\n'
