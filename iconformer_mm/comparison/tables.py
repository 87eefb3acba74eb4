"""Tables and plots of a comparison, from its finished runs."""

from __future__ import annotations

import csv
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from iconformer_mm.files import written_whole

from .intervals import average_ranks, differences_text, largest_grid, plot_ranks
from .markdown import to_markdown
from .plots import CurvePanel, TradeoffPanel, plot_curves, plot_tradeoff
from .prediction_plots import PredictionRow, plot_predictions
from .results import Results
from .spec import Method, Task
from .statistics import ranks_of

PICTURES = 'predictions.png'  # of tasks with pictures
FILES = ('results.json', 'results.csv', 'table.md', 'differences.md', 'search.md', 'tradeoff.png', 'curves.png')
RANKS = 'ranks.png'  # of several tasks


@dataclass
class Row:
    """What is known of one method on one task; scores are multiplied by the task's factor.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        mean: Mean score over the seeds, None where a run diverged.
        std: Its standard deviation, None of a single seed.
        seeds: Finished runs.
        diverged: Those of them that diverged; of a search without a rate, all of its runs.
        learning_rate: The rate that the search found.
        trained_parameters: In the whole model.
        trained_backbone: On the backbone's side; with a method for each module, in all of these.
        backbone_share: The latter by the parameters of the same modules.
        train_seconds: Mean over the runs.
        peak_memory: Peak of the training in bytes, mean over the runs that noted it; None if none did.
        rank: Among the methods on this task, 1 is the best; equal ones share the mean of theirs.
        scores: One a seed.
    """

    task: str
    method: str
    mean: float | None
    std: float | None
    seeds: int
    diverged: int
    learning_rate: float | None
    trained_parameters: int
    trained_backbone: int
    backbone_share: float
    train_seconds: float
    peak_memory: float | None = None
    rank: float = math.nan
    scores: tuple[float | None, ...] = ()


Rows = dict[tuple[str, str], Row]


def make_row(results: Results, task: Task, method: Method) -> Row | None:
    """Sum a method's runs on a task up; None before the first is finished."""
    if not results.searched(task, method):
        return None
    rate = results.best_rate(task, method)
    runs = results.of_seeds(task, method)
    if rate is None:
        runs = [results.finished[run.name] for run in results.comparison.searches(task, method)]
    if not runs:
        return None
    scores = [None if run['score'] is None else task.factor * run['score'] for run in runs]
    numbers = [score for score in scores if score is not None]
    whole = len(numbers) == len(scores)
    peaks = [run['peak_memory'] for run in runs if run.get('peak_memory') is not None]
    return Row(
        task=task.name,
        method=method.name,
        mean=statistics.mean(numbers) if whole else None,
        std=statistics.stdev(numbers) if whole and len(numbers) > 1 else None,
        seeds=0 if rate is None else len(runs),
        diverged=scores.count(None),
        learning_rate=rate,
        trained_parameters=runs[0]['trained_parameters'],
        trained_backbone=runs[0]['trained_backbone'],
        backbone_share=runs[0]['backbone_share'],
        train_seconds=statistics.mean(run['train_seconds'] for run in runs),
        peak_memory=statistics.mean(peaks) if peaks else None,
        scores=() if rate is None else tuple(scores),
    )


def make_rows(results: Results) -> Rows:
    """The rows of all tasks and methods, ranked."""
    rows: Rows = {}
    for task in results.comparison.tasks.values():
        pairs = results.comparison.pairs([task.name], results.comparison.methods)
        found = [row for pair in pairs if (row := make_row(results, *pair)) is not None]
        for row, rank in zip(found, ranks_of([task.key(row.mean) for row in found])):
            row.rank = rank
            rows[task.name, row.method] = row
    return rows


def score_text(task: Task, row: Row | None, best: bool, planned: int, bold: str) -> str:
    """A method's score on a task, as the table shows it."""
    if row is None:
        return '-'
    if row.mean is None:
        return f'diverged ({row.diverged} of {row.seeds})' if row.seeds else 'diverged'
    text = f'{row.mean:.{task.digits}f}'
    if row.std is not None:
        text += f' ± {row.std:.{task.digits}f}'
    if row.seeds < planned:
        text += f' (n={row.seeds})'
    return bold.format(text) if best else text


def backbones(results: Results) -> list[list[str]]:
    """The tasks, those on the same backbone together."""
    groups: dict[str, list[str]] = {}
    for task in results.comparison.tasks.values():
        groups.setdefault(task.base, []).append(task.name)
    return list(groups.values())


def table(results: Results, rows: Rows, bold: str) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table, methods as rows: the costs beside one task, the mean rank over several."""
    make = table_of_a_task if len(results.comparison.tasks) == 1 else table_of_tasks
    return make(results, rows, bold)


def table_of_a_task(results: Results, rows: Rows, bold: str) -> tuple[list[str], list[list[str]]]:
    """Titles and cells for one task."""
    (task,) = results.comparison.tasks.values()
    titles = ['method', 'trained params', share_title(results), task.title, 'seconds', 'adapter (KiB)']
    best = min((row.rank for row in rows.values()), default=None)
    lines = []
    for method in results.comparison.methods.values():
        row = rows.get((task.name, method.name))
        if row is None:
            lines.append([method.title, *'-----'])
            continue
        sizes = [run['adapter_bytes'] for run in results.of_seeds(task, method) if 'adapter_bytes' in run]
        score = score_text(task, row, row.rank == best, len(results.comparison.seeds), bold)
        size = f'{sizes[0] / 2**10:,.0f}' if sizes else '-'
        costs = [f'{row.trained_parameters:,}', f'{row.backbone_share:.2%}']
        lines.append([method.title, *costs, score, f'{row.train_seconds:.0f}', size])
    return titles, lines


def share_title(results: Results) -> str:
    """Title of the trained shares: of the backbone, or of all modules that a method adapts."""
    return 'adapted modules: share' if results.comparison.has_towers else 'backbone share'


def table_of_tasks(results: Results, rows: Rows, bold: str) -> tuple[list[str], list[list[str]]]:
    """Titles and cells for several tasks."""
    comparison = results.comparison
    groups = backbones(results)
    titles = ['method']
    titles += [share_title(results) + (f': {", ".join(group)}' if len(groups) > 1 else '') for group in groups]
    counted = comparison.held_out
    titles += [task.title for task in comparison.tasks.values()]
    titles.append('mean rank' if len(counted) == len(comparison.tasks) else 'mean rank, held out')
    lines = []
    for method in comparison.methods.values():
        own = [rows.get((task, method.name)) for task in comparison.tasks]
        line = [method.title]
        for group in groups:
            shares = [row.backbone_share for row in own if row is not None and row.task in group]
            line.append(f'{shares[0]:.2%}' if shares else '-')
        for task, row in zip(comparison.tasks.values(), own):
            ranks = [other.rank for other in rows.values() if other.task == task.name]
            best = row is not None and row.rank == min(ranks)
            line.append(score_text(task, row, best, len(comparison.seeds), bold))
        ranks = [rows[task.name, method.name].rank for task in counted if (task.name, method.name) in rows]
        line.append(mean_rank(ranks, len(counted)))
        lines.append(line)
    return titles, lines


def mean_rank(ranks: list[float], tasks: int) -> str:
    """The mean of a method's ranks; of how many tasks, unless of all."""
    if not ranks:
        return '-'
    note = '' if len(ranks) == tasks else f' ({len(ranks)} of {tasks})'
    return f'{statistics.mean(ranks):.1f}{note}'


def search_text(results: Results) -> str:
    """The searched rates and their scores, a Markdown table a task."""
    parts = ['# Search of the learning rates\n']
    seeds = results.comparison.search_seed
    named = f'Seed {seeds[0]}' if len(seeds) == 1 else f'Means over the seeds {", ".join(map(str, seeds))}'
    parts.append(f"{named}, on data apart from the comparison's. Bold: taken.\n")
    for task in results.comparison.tasks.values():
        if task.rates_of is not None:
            continue
        methods = [method for _, method in results.comparison.pairs([task.name], results.comparison.methods)]
        searches = {method.title: results.comparison.searches(task, method) for method in methods}
        rates = sorted({run.learning_rate for runs in searches.values() for run in runs})
        lines = []
        for method in methods:
            best = results.best_rate(task, method) if results.searched(task, method) else None
            own = searches[method.title]
            left = {run.learning_rate for run in own if run.name not in results.finished}
            tried = {run.learning_rate for run in own} - left
            found = {rate: results.search_score(task, method, rate) for rate in tried}
            lines.append([method.title, *(rate_text(task, found, rate, best) for rate in rates)])
        if rates:
            parts.append(f'## {task.title}\n')
            parts.append(to_markdown(['method', *(f'{rate:g}' for rate in rates)], lines))
            edges = at_edge(results, task)
            if edges:
                parts.append(f'Best at the edge of its rates, and perhaps better beyond: {", ".join(edges)}.\n')
    if len(parts) == 2:
        parts[1] = 'There was no search: the file of the comparison has one rate for each task and method.\n'
    return '\n'.join(parts)


def at_edge(results: Results, task: Task) -> list[str]:
    """Titles of the methods whose best rate on a task is the lowest or the highest that was searched, with the rate."""
    found = []
    for _, method in results.comparison.pairs([task.name], results.comparison.methods):
        if results.comparison.searches(task, method) and results.searched(task, method):
            rates, best = results.comparison.rates(task, method), results.best_rate(task, method)
            if best is not None and best in (min(rates), max(rates)):
                found.append(f'{method.title} ({best:g})')
    return found


def rate_text(task: Task, scores: Mapping[float, float | None], rate: float, best: float | None) -> str:
    """The score at one rate, as the table of the search shows it."""
    if rate not in scores:
        return '-'
    score = scores[rate]
    if score is None:
        return 'diverged'
    text = f'{task.factor * score:.{task.digits}f}'
    return f'**{text}**' if rate == best else text


def axis_title(task: Task) -> str:
    """A task's title, with the direction where it is not the usual one."""
    return task.title if task.higher_is_better else f'{task.title}, lower is better'


def tradeoff_panels(results: Results, rows: Rows) -> list[TradeoffPanel]:
    """What is plotted of scores against trained parameters: a panel a task that was run."""
    panels = []
    for task in results.comparison.tasks.values():
        points = {
            results.comparison.methods[row.method].title: (row.trained_backbone, row.mean, row.std or 0.0)
            for row in rows.values()
            if row.task == task.name and row.mean is not None
        }
        where = 'adapted modules' if results.comparison.has_towers else 'backbone'
        panels.append(TradeoffPanel(axis_title(task), points, where))
    return [panel for panel in panels if panel.points] or panels


def curve_panels(results: Results, rows: Rows) -> list[CurvePanel]:
    """What is plotted of the training: the mean over the seeds of the runs that did not diverge."""
    panels = []
    for task in results.comparison.tasks.values():
        curves = {}
        for row in rows.values():
            method = results.comparison.methods[row.method]
            if row.task == task.name and row.mean is not None:
                runs = [run['curve'] for run in results.of_seeds(task, method)]
                curves[method.title] = [(points[0][0], statistics.mean(p[1] for p in points)) for points in zip(*runs)]
        panels.append(CurvePanel(f'{task.name}: training loss', curves))
    return [panel for panel in panels if panel.curves] or panels


def plot_pictures(results: Results, path: Path) -> bool:
    """Plot what the first seed of each method predicts on some images, beside the ground truth.

    Args:
        results: The results.
        path: Image file to write.

    Returns:
        Whether there was something to plot: the tasks have pictures, and all methods on them have a finished run.
    """
    rows, methods = [], list(results.comparison.methods.values())
    for task in results.comparison.tasks.values():
        files = [file for method in methods if (file := results.pictures_of(task, method)) is not None]
        if len(files) < len(methods):
            continue
        kept = [dict(np.load(file)) for file in files]
        for index, image in enumerate(kept[0]['images']):
            maps = [kept[0]['truth'][index], *(one['predicted'][index] for one in kept)]
            rows.append(PredictionRow(task.name, image, maps))
    if rows:
        columns = ['ground truth', *(method.title for method in methods)]
        write(path, lambda temporary: plot_predictions(rows, columns, temporary))
    return bool(rows)


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Have a file written, which is complete or as it was."""
    with written_whole(path) as temporary:
        writer(temporary)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write one line per task and method."""
    with open(path, 'w', newline='', encoding='utf-8') as file:
        names = [name for name in Row.__dataclass_fields__ if name != 'scores']
        writer = csv.DictWriter(file, names, extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def report(results: Results, folder: Path, console: Console) -> None:
    """Write tables and plots of what is finished, and print the table.

    Args:
        results: What is finished.
        folder: Where the files are written, see ``FILES``.
        console: Where to print.
    """
    comparison = results.comparison
    rows = make_rows(results)
    number = len(comparison.seeds)
    title = f'{comparison.title}, mean ± std over {number} seed{"s" if number > 1 else ""}'
    titles, lines = table(results, rows, '[bold]{}[/bold]')
    print_table(title, [textwrap.wrap(words, 12) for words in titles], lines, console)
    markdown = f'{title}\n\n' + to_markdown(*table(results, rows, '**{}**'))
    content = dict(title=comparison.title, rows=[asdict(row) for row in rows.values()])
    write(folder / 'results.json', lambda path: path.write_text(json.dumps(content, indent=2) + '\n', 'utf-8'))
    write(folder / 'results.csv', lambda path: write_csv(rows.values(), path))
    write(folder / 'table.md', lambda path: path.write_text(markdown, 'utf-8'))
    write(folder / 'differences.md', lambda path: path.write_text(differences_text(results), 'utf-8'))
    write(folder / 'search.md', lambda path: path.write_text(search_text(results), 'utf-8'))
    names = [method.title for method in comparison.methods.values()]
    full = next((method.title for method in comparison.methods.values() if method.type == 'full'), None)
    write(folder / 'tradeoff.png', lambda path: plot_tradeoff(tradeoff_panels(results, rows), names, path, full))
    write(folder / 'curves.png', lambda path: plot_curves(curve_panels(results, rows), names, path, full))
    written = [*FILES]
    means = {key: row.mean for key, row in rows.items() if row.mean is not None and row.seeds == len(comparison.seeds)}
    ranked, methods = largest_grid(comparison, means)
    if len(methods) > 1 and len(ranked) > 1:
        ranks = average_ranks(ranked, methods, means)
        write(folder / RANKS, lambda path: plot_ranks(ranks, [task.title for task in ranked], path))
        written.append(RANKS)
    else:
        (folder / RANKS).unlink(missing_ok=True)  # of an earlier report, whose runs count no more
    if plot_pictures(results, folder / PICTURES):
        written.append(PICTURES)
    for task in comparison.tasks.values():
        if task.rates_of is None and (edges := at_edge(results, task)):
            console.print(f'{task.title}: best at the edge of the searched rates: {", ".join(edges)}')
    console.print(f'wrote {", ".join(written)} to {folder}')


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
