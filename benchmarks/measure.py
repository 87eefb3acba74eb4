"""Helpers of the benchmarks: timing of contestants in interleaved rounds, ratios, and result files."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from iconformer_mm.analysis import inspection
from iconformer_mm.comparison.markdown import to_markdown
from iconformer_mm.engine import load_config
from iconformer_mm.figures import new_figure, save_figure

ROOT = Path(__file__).resolve().parent.parent

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def make_parser(description: str, out: str, cases: Sequence[str], default: Sequence[str]) -> argparse.ArgumentParser:
    """Build the command line that the speed benchmarks share.

    Args:
        description: What is measured.
        out: Default folder for the results.
        cases: The choices of ``--cases``.
        default: The default of ``--cases``.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--out', type=Path, default=Path(out), help='folder for the results')
    parser.add_argument('--rounds', type=int, default=7, help='number of rounds; results are medians over them (7)')
    parser.add_argument('--threads', type=int, default=1, help='CPU threads of torch (1)')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='device to run on (cpu)')
    parser.add_argument('--dtype', choices=tuple(DTYPES), default='float32', help='precision (float32)')
    parser.add_argument(
        '--cases', nargs='+', choices=cases, default=list(default), metavar='CASE', help=', '.join(cases)
    )
    return parser


def prepare(args: argparse.Namespace, min_rounds: int = 1) -> None:
    """Set the seed and the number of threads.

    Raises:
        SystemExit: The device is not available, or the rounds are too few.
    """
    if args.rounds < min_rounds:
        raise SystemExit(f'--rounds must be at least {min_rounds}, got {args.rounds}')
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise SystemExit('--device cuda: torch sees no CUDA device here')
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)


def precision(device: str, dtype: torch.dtype) -> AbstractContextManager:
    """Return an autocast context for a dtype. For float32 it does nothing."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype=dtype)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that the results of a run depend on."""
    if args.device == 'cuda':
        device = torch.cuda.get_device_name()
    else:
        device = f'CPU ({torch.backends.cpu.get_cpu_capability()}), threads: {args.threads}'
    return dict(device=device, dtype=args.dtype, rounds=args.rounds, torch=torch.__version__)


def build_model(config: str, changes: Mapping[str, Any] | None = None) -> BaseModel:
    """The model of a config without its pre-trained weights, the same one each time.

    Args:
        config: Path under ``configs/``.
        changes: Settings that override those of the config, with dotted keys. Defaults to None.
    """
    cfg = load_config(str(ROOT / 'configs' / config))
    cfg.merge_from_dict(dict(changes or {}))
    cfg.model.pop('pretrained', None)
    cfg.model.backbone.pop('init_cfg', None)
    torch.manual_seed(0)
    return inspection.build_model(cfg)


def progress_bar() -> Progress:
    """Make a progress display with one bar per task."""
    return Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    progress: Progress,
    description: str,
    device: str = 'cpu',
    min_seconds: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Time contestants in turn, round by round, so that slow drifts of the machine affect all of them equally.

    Args:
        contestants: The calls, by name. Each is run once to warm up before the rounds.
        rounds: Number of rounds.
        progress: Display for the progress bar.
        description: Label of the bar.
        device: ``'cuda'`` to wait for the device. Defaults to ``'cpu'``.
        min_seconds: Minimum duration of a measurement. A shorter call is repeated, and the mean is taken. With 0, each
            round makes a single call, and no call is made to find the number of repetitions. Defaults to 0.02.
        clock: Returns seconds. ``time.process_time`` counts those of this process only, for one thread on a machine
            that others use. Defaults to ``time.perf_counter``.
        warm_up: Whether to run each call once before the rounds, without timing it. Defaults to True.

    Returns:
        The seconds per call in every round, by the contestants' names.
    """

    def seconds(call: Callable[[], object], number: int) -> float:
        start = clock()
        for _ in range(number):
            call()
        if device == 'cuda':
            torch.cuda.synchronize()
        return (clock() - start) / number

    bar = progress.add_task(description, total=(rounds + 1) * len(contestants))
    numbers = {}
    for name, call in contestants.items():
        if warm_up:
            seconds(call, 1)
        numbers[name] = math.ceil(min_seconds / seconds(call, 1)) if min_seconds else 1
        progress.advance(bar)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            times[name].append(seconds(call, numbers[name]))
            progress.advance(bar)
    return times


def replayed(call: Callable[[], object]) -> Callable[[], None]:
    """Record a CUDA call as a graph. Replaying it takes only device time, without Python and dispatch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ratio(times: Sequence[float], reference: Sequence[float]) -> float:
    """Return the median over the rounds of the ratio within each round."""
    return statistics.median(a / b for a, b in zip(times, reference))


def rows_of(
    times: Mapping[str, Sequence[float]], references: Mapping[str, str], **columns: Any
) -> list[dict[str, Any]]:
    """Convert the result of :func:`interleave` to rows of a table.

    Args:
        times: Seconds in every round, by contestant.
        references: Contestants to compare the others with, by the column of the ratio.
        **columns: Values that all rows share, for the first columns.

    Returns:
        One row per contestant: the shared columns, ``contestant``, ``ms`` (median), the ratios to the references that
        took part, and ``seconds`` of every round.
    """
    rows = []
    for name, seconds in times.items():
        row = dict(columns, contestant=name, ms=1000 * statistics.median(seconds))
        for column, reference in references.items():
            if reference in times:
                row[column] = ratio(seconds, times[reference])
        rows.append(dict(row, seconds=list(seconds)))
    return rows


@dataclass(frozen=True)
class Table:
    """Rows of results.

    Attributes:
        name: Title, and key in the JSON file.
        columns: The columns to show, with their format: ``''`` for text, or one such as ``'.2f'`` for numbers.
        rows: Values by column. A missing value is shown as ``-``.
    """

    name: str
    columns: Mapping[str, str]
    rows: Sequence[Mapping[str, Any]]

    def cells(self) -> list[list[str]]:
        """Format the rows as text."""
        return [
            [format(row[column], form) if row.get(column) is not None else '-' for column, form in self.columns.items()]
            for row in self.rows
        ]

    def to_markdown(self) -> str:
        """Format the table, with its title, as Markdown."""
        return f'## {self.name}\n\n{to_markdown(list(self.columns), self.cells())}'


@dataclass(frozen=True)
class Panel:
    """A plot of one quantity.

    Attributes:
        title: Title.
        series: x and y values of the points, by the name of the series. x values are names or numbers.
        ylabel: Label of the y axis.
        xlabel: Label of the x axis. Defaults to ``''``.
        log: Axes with a logarithmic scale: ``'x'``, ``'y'`` or ``'xy'``. Defaults to ``''``.
        line: y value of a horizontal line, such as 1 for ratios. Defaults to None.
    """

    title: str
    series: Mapping[str, tuple[Sequence[Any], Sequence[float]]]
    ylabel: str
    xlabel: str = ''
    log: str = ''
    line: float | None = None


def series_of(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> dict[str, tuple[list[Any], list[float]]]:
    """Collect one series per contestant, from the rows that have the y value.

    Args:
        rows: Rows with a column ``contestant``.
        x: Column of the x values.
        y: Column of the y values.
    """
    series: dict[str, tuple[list[Any], list[float]]] = {}
    for row in rows:
        if row.get(y) is not None:
            places, heights = series.setdefault(row['contestant'], ([], []))
            places.append(row[x])
            heights.append(row[y])
    return series


def plot(panels: Sequence[Panel], path: Path) -> None:
    """Plot panels below one another."""
    figure = new_figure(9, 4.2 * len(panels))
    for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0]):
        for index, (name, (places, heights)) in enumerate(panel.series.items()):
            style = '-' if 'x' in panel.log else ''
            axes.plot(places, heights, 'os^DvP*X<>'[index % 10] + style, color=f'C{index % 10}', label=name, alpha=0.8)
        if panel.line is not None:
            axes.axhline(panel.line, color='black', linestyle='--', linewidth=1)
        if 'x' in panel.log:
            axes.set_xscale('log')
        elif any(panel.series.values()):
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha='right', rotation_mode='anchor')
        if 'y' in panel.log:
            axes.set_yscale('log')
        elif 'x' in panel.log:
            axes.set_ylim(bottom=0)  # show slow growth as slow
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.grid(alpha=0.3)
        axes.legend(loc='center left', bbox_to_anchor=(1, 0.5), frameon=False)
    save_figure(figure, path, dpi=120)


def write_results(
    out: Path, tables: Sequence[Table], settings: Mapping[str, Any] | None = None, panels: Sequence[Panel] = ()
) -> None:
    """Print tables, and write ``results.json``, ``results.md`` and, if there are panels, ``results.png``.

    Args:
        out: Folder. It is created.
        tables: The tables. The JSON file also has the columns that are not shown.
        settings: The settings that the results depend on. Defaults to None.
        panels: The panels of the plot. Defaults to none.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = '\n'.join(table.to_markdown() for table in tables)
    if settings:
        text = ', '.join(f'{name}: {value}' for name, value in settings.items()) + '\n\n' + text
    print(text)
    (out / 'results.md').write_text(text, encoding='utf-8')
    content = {'settings': settings or {}, **{table.name: table.rows for table in tables}}
    (out / 'results.json').write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    if panels:
        plot(panels, out / 'results.png')
