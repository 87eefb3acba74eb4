"""Tables of intervals and paired differences, and the diagram of average ranks."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from iconformer_mm.figures import new_figure, save_figure

from .image_scores import ImageScores
from .markdown import to_markdown
from .results import Results
from .spec import Comparison, Method, Task
from .statistics import Interval, SeedScores, cliques, critical_difference, interval, paired_difference, ranks_of


def reference_of(comparison: Comparison) -> Method:
    """The method that the others are compared with: the one that the file names, else iCoN, else the first."""
    methods = comparison.methods
    if comparison.reference is not None:
        return methods[comparison.reference]
    return next((each for each in methods.values() if each.type == 'icon'), next(iter(methods.values())))


def seed_scores(results: Results, task: Task, method: Method) -> SeedScores | None:
    """What the runs of a method on a task gave; None before the first is finished, and where one diverged.

    Scores are multiplied by the task's factor. Where a lower score is better, they are negative.
    """
    if task.name not in method.tasks or not results.searched(task, method):
        return None
    runs = results.of_seeds(task, method)
    if not runs or any(run['score'] is None for run in runs):
        return None
    sign = task.factor if task.higher_is_better else -task.factor
    scores, images = {}, {}
    for run in runs:
        seed = run['settings']['seed']
        scores[seed] = sign * run['score']
        if run.get('images') is not None:
            found = ImageScores.from_json(run['images'])
            images[seed] = ImageScores(sign * found.numerators, found.denominators)
    return SeedScores(scores, images if len(images) == len(scores) else {})


def interval_text(found: Interval | None, digits: int, flip: bool = False) -> str:
    """The bounds of an interval; a hyphen where there is none.

    Args:
        found: The interval.
        digits: Digits after the point.
        flip: Whether the scores are negative ones, to be shown as they were. Defaults to False.
    """
    if found is None:
        return '-'
    low, high = (-found.high, -found.low) if flip else (found.low, found.high)
    return f'{low:.{digits}f} to {high:.{digits}f}'


def differences_text(results: Results) -> str:
    """Scores with intervals, and how much better the reference is than each other method: a Markdown table per task."""
    comparison = results.comparison
    reference = reference_of(comparison)
    parts = [
        f'# Intervals, and differences from {reference.title}\n',
        'Intervals are 95 % bootstrap intervals over seeds and test images. Where the score is no mean over images, '
        'they are over seeds alone. Differences are paired: the same seeds, the same images. They are positive where '
        f'{reference.title} is better. Bold: the interval excludes zero.\n',
    ]
    for task in comparison.tasks.values():
        own = seed_scores(results, task, reference)
        lines = []
        for _, method in comparison.pairs([task.name], comparison.methods):
            runs = seed_scores(results, task, method)
            if runs is None:
                continue
            shown = statistics.mean(runs.scores.values()) * (1 if task.higher_is_better else -1)
            line = [method.title, str(len(runs.scores)), f'{shown:.{task.digits}f}']
            line.append(interval_text(interval(runs), task.digits, flip=not task.higher_is_better))
            found = None if own is None or method is reference else paired_difference(own, runs)
            mark = '**' if found is not None and found.excludes_zero else ''
            line.append('-' if found is None else f'{mark}{found.mean:+.{task.digits}f}{mark}')
            line.append(interval_text(found, task.digits))
            lines.append(line)
        if lines:
            parts.append(f'## {task.title}\n')
            titles = ['method', 'seeds', 'mean', 'interval', f'{reference.title} better by', 'interval']
            parts.append(to_markdown(titles, lines))
    return '\n'.join(parts)


def largest_grid(comparison: Comparison, done: Collection[tuple[str, str]]) -> tuple[list[Task], list[Method]]:
    """The largest complete part of an unfinished grid: held-out tasks, and the methods finished on all of them.

    The part with the most cells is taken. Of equal ones, it is that with the most methods.

    Args:
        comparison: The comparison.
        done: The names of a task and a method, for each cell whose seeds are all finished.
    """
    order = list(comparison.methods)
    finished = {
        task.name: frozenset(name for name in order if (task.name, name) in done) for task in comparison.held_out
    }
    # The methods of the largest part are those that some tasks have in common.
    common: set[frozenset[str]] = set()
    for own in finished.values():
        common |= {own, *(own & other for other in common)}

    def tasks_of(methods: frozenset[str]) -> list[Task]:
        return [task for task in comparison.held_out if methods <= finished[task.name]]

    def size(methods: frozenset[str]) -> tuple[int, int, list[int]]:
        return len(tasks_of(methods)) * len(methods), len(methods), sorted(-order.index(name) for name in methods)

    best = max(common, key=size)
    return tasks_of(best), [comparison.methods[name] for name in order if name in best]


def average_ranks(
    tasks: Sequence[Task], methods: Sequence[Method], means: Mapping[tuple[str, str], float]
) -> dict[str, float]:
    """The average rank of each method, among these methods.

    Args:
        tasks: The tasks.
        methods: The methods, finished on all of them.
        means: The mean scores, by the names of a task and a method.

    Returns:
        By the methods' titles.
    """
    ranks = [ranks_of([task.key(means[task.name, method.name]) for method in methods]) for task in tasks]
    return {method.title: statistics.mean(own) for method, own in zip(methods, zip(*ranks))}


def plot_ranks(ranks: Mapping[str, float], tasks: Sequence[str], path: Path) -> None:
    """Draw a critical-difference diagram: average ranks, and bars over methods that do not differ at 5 %.

    Args:
        ranks: Average rank of each method, two methods at least.
        tasks: Titles of the tasks.
        path: Image file to write.
    """
    difference = critical_difference(len(ranks), len(tasks))
    order = sorted(ranks, key=lambda name: ranks[name])
    groups = cliques(ranks, difference)
    figure = new_figure(7.0, 1.3 + 0.26 * len(order) / 2 + 0.14 * len(groups))
    axes = figure.subplots()
    low, high = 1, len(order)
    axes.set_xlim(low - 0.35 * (high - low), high + 0.35 * (high - low))
    axes.hlines(0, low, high, color='black')
    for tick in range(low, high + 1):
        axes.vlines(tick, 0, 0.12, color='black')
        axes.annotate(str(tick), (tick, 0.2), ha='center', va='bottom')
    depth = -0.28 - 0.16 * len(groups)
    half = (len(order) + 1) // 2
    for index, name in enumerate(order):
        left = index < half
        y = depth - 0.3 * (index if left else len(order) - 1 - index)
        edge = low - 0.03 * (high - low) if left else high + 0.03 * (high - low)
        axes.plot([ranks[name], ranks[name], edge], [0, y, y], color='black', linewidth=0.8)
        text = f'{name} ({ranks[name]:.1f})'
        axes.annotate(text, (edge, y), ha='right' if left else 'left', va='center', fontsize=9)
    for index, group in enumerate(groups):
        y = -0.16 - 0.16 * index
        axes.hlines(y, ranks[group[0]] - 0.03, ranks[group[-1]] + 0.03, color='C0', linewidth=3)
    axes.set_title(
        f'average rank, 1 is the best; bars join methods that do not differ (critical difference {difference:.1f})\n'
        + textwrap.fill(f'on {", ".join(tasks)}', 100),
        fontsize=9,
    )
    axes.set_ylim(depth - 0.3 * half, 0.75)
    axes.set_axis_off()
    save_figure(figure, path)
