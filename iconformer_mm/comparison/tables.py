"""Tables and plots of a comparison, from its finished cells."""

from __future__ import annotations

import csv
import json
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from iconformer_mm.files import written_whole

from .experiments import print_table, to_markdown
from .plots import CurvePanel, TradeoffPanel, plot_curves, plot_tradeoff
from .results import Board
from .spec import Method, Task

FILES = ('results.json', 'results.csv', 'table.md', 'search.md', 'tradeoff.png', 'curves.png')


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
        trained_backbone: On the backbone's side.
        backbone_share: The latter by the backbone's parameters.
        train_seconds: Mean over the runs.
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
    rank: float = math.nan
    scores: tuple[float | None, ...] = ()


Rows = dict[tuple[str, str], Row]


def make_row(board: Board, task: Task, method: Method) -> Row | None:
    """Sum a method's runs on a task up; None before the first is finished."""
    if not board.searched(task, method):
        return None
    rate = board.best_rate(task, method)
    cells = board.results(task, method)
    if rate is None:
        cells = [board.finished[cell.name] for cell in board.comparison.searches(task, method)]
    if not cells:
        return None
    scores = [None if cell['score'] is None else task.factor * cell['score'] for cell in cells]
    numbers = [score for score in scores if score is not None]
    whole = len(numbers) == len(scores)
    return Row(
        task=task.name,
        method=method.name,
        mean=statistics.mean(numbers) if whole else None,
        std=statistics.stdev(numbers) if whole and len(numbers) > 1 else None,
        seeds=0 if rate is None else len(cells),
        diverged=scores.count(None),
        learning_rate=rate,
        trained_parameters=cells[0]['trained_parameters'],
        trained_backbone=cells[0]['trained_backbone'],
        backbone_share=cells[0]['backbone_share'],
        train_seconds=statistics.mean(cell['train_seconds'] for cell in cells),
        scores=() if rate is None else tuple(scores),
    )


def make_rows(board: Board) -> Rows:
    """The rows of all tasks and methods, ranked."""
    rows: Rows = {}
    for task in board.comparison.tasks.values():
        pairs = board.comparison.pairs([task.name], board.comparison.methods)
        found = [row for pair in pairs if (row := make_row(board, *pair)) is not None]
        keys = [task.key(row.mean) for row in found]
        for row, key in zip(found, keys):
            row.rank = sum(other < key for other in keys) + (keys.count(key) + 1) / 2
            rows[task.name, row.method] = row
    return rows


def score_cell(task: Task, row: Row | None, best: bool, planned: int, bold: str) -> str:
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


def backbones(board: Board) -> list[list[str]]:
    """The tasks, those on the same backbone together."""
    groups: dict[str, list[str]] = {}
    for task in board.comparison.tasks.values():
        groups.setdefault(task.base, []).append(task.name)
    return list(groups.values())


def table(board: Board, rows: Rows, bold: str) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table, methods as rows."""
    comparison = board.comparison
    groups = backbones(board)
    titles = ['method']
    titles += ['backbone share' + (f': {", ".join(group)}' if len(groups) > 1 else '') for group in groups]
    titles += [task.title for task in comparison.tasks.values()] + ['mean rank']
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
            line.append(score_cell(task, row, best, len(comparison.seeds), bold))
        line.append(mean_rank([row.rank for row in own if row is not None], len(own)))
        lines.append(line)
    return titles, lines


def mean_rank(ranks: list[float], tasks: int) -> str:
    """The mean of a method's ranks; of how many tasks, unless of all."""
    if not ranks:
        return '-'
    note = '' if len(ranks) == tasks else f' ({len(ranks)} of {tasks})'
    return f'{statistics.mean(ranks):.1f}{note}'


def search_text(board: Board) -> str:
    """The searched rates and their scores, a Markdown table a task."""
    parts = ['# Search of the learning rates\n']
    parts.append(f"Seed {board.comparison.search_seed}, on data apart from the comparison's. Bold: taken.\n")
    for task in board.comparison.tasks.values():
        lines = []
        for method in board.comparison.methods.values():
            if task.name not in method.tasks:
                continue
            best = board.best_rate(task, method) if board.searched(task, method) else None
            cells = [board.finished.get(cell.name) for cell in board.comparison.searches(task, method)]
            lines.append([method.title, *(search_cell(task, cell, best) for cell in cells)])
        parts.append(f'## {task.title}\n')
        parts.append(to_markdown(['method', *(f'{rate:g}' for rate in task.learning_rates)], lines))
    return '\n'.join(parts)


def search_cell(task: Task, content: dict | None, best: float | None) -> str:
    """The score at one rate."""
    if content is None:
        return '-'
    if content['score'] is None:
        return 'diverged'
    text = f'{task.factor * content["score"]:.{task.digits}f}'
    return f'**{text}**' if content['settings']['learning_rate'] == best else text


def axis_title(task: Task) -> str:
    """A task's title, with the direction where it is not the usual one."""
    return task.title if task.higher_is_better else f'{task.title}, lower is better'


def tradeoff_panels(board: Board, rows: Rows) -> list[TradeoffPanel]:
    """What is plotted of scores against trained parameters: a panel a task that was run."""
    panels = []
    for task in board.comparison.tasks.values():
        points = {
            board.comparison.methods[row.method].title: (row.trained_backbone, row.mean, row.std or 0.0)
            for row in rows.values()
            if row.task == task.name and row.mean is not None
        }
        panels.append(TradeoffPanel(axis_title(task), points))
    return [panel for panel in panels if panel.points] or panels


def curve_panels(board: Board, rows: Rows) -> list[CurvePanel]:
    """What is plotted of the training: the mean over the seeds of the runs that did not diverge."""
    panels = []
    for task in board.comparison.tasks.values():
        curves = {}
        for row in rows.values():
            method = board.comparison.methods[row.method]
            if row.task == task.name and row.mean is not None:
                runs = [cell['curve'] for cell in board.results(task, method)]
                curves[method.title] = [(points[0][0], statistics.mean(p[1] for p in points)) for points in zip(*runs)]
        panels.append(CurvePanel(f'{task.name}: training loss', curves))
    return [panel for panel in panels if panel.curves] or panels


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Have a file written, which is complete or as it was."""
    with written_whole(path) as temporary:
        writer(temporary)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Write a line a task and method."""
    with open(path, 'w', newline='', encoding='utf-8') as file:
        names = [name for name in Row.__dataclass_fields__ if name != 'scores']
        writer = csv.DictWriter(file, names, extrasaction='ignore', lineterminator='\n')
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def report(board: Board, folder: Path, console: Console) -> None:
    """Write tables and plots of what is finished, and print the table.

    Args:
        board: What is finished.
        folder: Where the files are written, see ``FILES``.
        console: Where to print.
    """
    comparison = board.comparison
    rows = make_rows(board)
    title = f'{comparison.title}, mean ± std over {len(comparison.seeds)} seeds'
    titles, lines = table(board, rows, '[bold]{}[/bold]')
    print_table(title, [textwrap.wrap(words, 12) for words in titles], lines, console)
    markdown = f'{title}\n\n' + to_markdown(*table(board, rows, '**{}**'))
    results = dict(title=comparison.title, rows=[asdict(row) for row in rows.values()])
    write(folder / 'results.json', lambda path: path.write_text(json.dumps(results, indent=2) + '\n', 'utf-8'))
    write(folder / 'results.csv', lambda path: write_csv(rows.values(), path))
    write(folder / 'table.md', lambda path: path.write_text(markdown, 'utf-8'))
    write(folder / 'search.md', lambda path: path.write_text(search_text(board), 'utf-8'))
    names = [method.title for method in comparison.methods.values()]
    full = next((method.title for method in comparison.methods.values() if method.method['type'] == 'full'), None)
    write(folder / 'tradeoff.png', lambda path: plot_tradeoff(tradeoff_panels(board, rows), names, path, full))
    write(folder / 'curves.png', lambda path: plot_curves(curve_panels(board, rows), names, path, full))
    console.print(f'wrote {", ".join(FILES)} to {folder}')
