"""Which runs of a comparison are finished, and what they gave."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .image_scores import ImageScores
from .spec import Comparison, ComparisonError, Method, Run, Task

# Where the files of the runs are: what this release writes, and what version 0.1 wrote.
FOLDERS = ('runs', 'cells')
# What the file of every run has as numbers.
NUMBERS = ('train_seconds', 'trained_parameters', 'trained_backbone', 'backbone_share')


def result_files(folder: Path) -> dict[str, Path]:
    """The files of the finished runs of a comparison, by the names of the runs.

    Args:
        folder: Folder of the comparison.
    """
    found: dict[str, Path] = {}
    for part in FOLDERS:
        for path in sorted((folder / part).glob('*/*/*.json')):
            found.setdefault(path.relative_to(folder / part).with_suffix('').as_posix(), path)
    return dict(sorted(found.items()))


def check_content(content: dict[str, Any]) -> int | None:
    """Check what the file of a run holds beside its settings.

    Args:
        content: The content of the file.

    Returns:
        How many images the score is of; None if they were not noted.

    Raises:
        KeyError: Something is missing.
        ValueError: A value is no such value, or the images do not add up to the score.
        TypeError: A value is of another type.
    """
    score = content['score']
    for number in (0 if score is None else score, *(content[key] for key in NUMBERS)):
        if not math.isfinite(number):
            raise ValueError(f'{number} is no result')
    np.asarray(content['curve'], dtype=float).reshape(-1, 2)
    if content.get('images') is None:
        return None
    images = ImageScores.from_json(content['images'])
    if score is None or not images.sum_up_to(score):
        raise ValueError('the images do not add up to the score')
    return len(images.numerators)


class Results:
    """The finished runs of a comparison: those with a file of the same settings.

    Args:
        comparison: The comparison.
        folder: Folder of the comparison. The files are ``runs/<task>/<method>/<run>.json`` in it.

    Attributes:
        finished: What the files hold, by the runs' names.
        stale: Of runs whose file has other settings, the names of these.

    Raises:
        ComparisonError: A file is damaged, or runs of a task were not validated on the same number of images.
    """

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self.comparison = comparison
        self.folder = folder
        self.finished: dict[str, dict] = {}
        self.stale: dict[str, list[str]] = {}
        self._images: dict[tuple[str, bool], tuple[int, Path]] = {}  # by task and whether it is the search
        self.refresh()

    def file(self, run: Run) -> Path:
        """Where a run's result is written."""
        return self.folder / FOLDERS[0] / f'{run.name}.json'

    def work_dir(self, run: Run) -> Path:
        """Where a run works; the folder is removed when it is finished."""
        return self.folder / FOLDERS[0] / run.name

    def _find(self, run: Run) -> Path | None:
        """The file of a run; None if there is none."""
        places = (self.folder / part / f'{run.name}.json' for part in FOLDERS)
        return next((place for place in places if place.is_file()), None)

    def refresh(self) -> None:
        """Look for files of runs that are not known to be finished."""
        for pair in self.comparison.pairs(self.comparison.tasks, self.comparison.methods):
            # The runs come one by one: with a search complete, its seeds follow.
            for run in self.known(*pair):
                path = self._find(run)
                if run.name not in self.finished and path is not None:
                    self._read(run, path)

    def _read(self, run: Run, path: Path) -> None:
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            found = dict(content['settings'])
            count = check_content(content)
        except (ValueError, KeyError, TypeError):
            raise ComparisonError(f'{path} is damaged; remove it, and it is run again') from None
        settings = json.loads(json.dumps(run.settings))
        if found != settings:
            self.stale[run.name] = [key for key in settings if found.get(key) != settings[key]]
            return
        if count is not None:
            others, first = self._images.setdefault((run.task.name, run.search), (count, path))
            if count != others:
                raise ComparisonError(
                    f'{path} has the scores of {count} images, and {first} those of {others}: the images of '
                    f"'{run.task.name}' changed between these runs; remove all files of the older ones"
                )
        self.finished[run.name] = content
        self.stale.pop(run.name, None)

    def known(self, task: Task, method: Method) -> Iterator[Run]:
        """The search of a method on a task and, if that is finished and found a rate, the runs at it."""
        searches = self.comparison.searches(task, method)
        yield from searches
        if self.searched(task, method):
            best = self.best_rate(task, method)
            if best is not None:
                yield from self.comparison.runs(task, method, best)

    def searched(self, task: Task, method: Method) -> bool:
        """Whether all learning rates were tried."""
        return all(run.name in self.finished for run in self.comparison.searches(task, method))

    def best_rate(self, task: Task, method: Method) -> float | None:
        """The rate with the best mean score in a finished search, of equal ones the smallest; None if all diverged.

        A rate at which a run diverged counts as diverged.
        """
        task = self.comparison.searched_task(task)
        rates = self.comparison.rates(task, method)
        if len(rates) == 1:
            return rates[0]
        scores = {rate: self.search_score(task, method, rate) for rate in rates}
        best = min(scores, key=lambda rate: (task.key(scores[rate]), rate))
        return None if scores[best] is None else best

    def search_score(self, task: Task, method: Method, rate: float) -> float | None:
        """The mean score of the search at a rate; None if a run diverged."""
        searches = self.comparison.searches(task, method)
        scores = [self.finished[run.name]['score'] for run in searches if run.learning_rate == rate]
        return None if None in scores else statistics.mean(scores)

    def of_seeds(self, task: Task, method: Method) -> list[dict]:
        """What the finished runs of a method on a task gave, one a seed, without the search."""
        runs = self.known(task, method)
        return [self.finished[run.name] for run in runs if not run.search and run.name in self.finished]

    def pictures_of(self, task: Task, method: Method) -> Path | None:
        """What a method's first run predicted on :attr:`Task.pictures`; None if there is no such file."""
        rate = self.best_rate(task, method) if self.searched(task, method) else None
        if rate is None or not task.pictures or task.name not in method.tasks:
            return None
        path = self.file(self.comparison.runs(task, method, rate)[0]).with_suffix('.npz')
        return path if path.is_file() else None

    def ready(self, tasks: Collection[str], methods: Collection[str]) -> list[Run]:
        """The unfinished runs that could be run now, in order."""
        pairs = self.comparison.pairs(tasks, methods)
        runs = {run.name: run for pair in pairs for run in self.known(*pair)}  # tasks can share a search
        return [run for run in runs.values() if run.name not in self.finished]

    def untried(self, tasks: Collection[str], methods: Collection[str]) -> list[Run]:
        """A run of each method on each task where none is finished; of the search, too, where it has other settings.

        Their rates are the first that are searched.
        """

        def kind(task: str, method: str, search: bool) -> tuple[str, str, bool]:
            return task, method, search and bool(self.comparison.tasks[task].search_options)

        runs: dict[tuple[str, str, bool], Run] = {}
        for task, method in self.comparison.pairs(tasks, methods):
            first, *_ = self.comparison.runs(task, method, self.comparison.rates(task, method)[0])
            for run in (*self.comparison.searches(task, method)[:1], first):
                runs.setdefault(kind(run.task.name, method.name, run.search), run)
        for name in self.finished:
            task_name, method_name, last = name.split('/')
            runs.pop(kind(task_name, method_name, last.startswith('search')), None)
        return list(runs.values())

    def left(self, tasks: Collection[str], methods: Collection[str]) -> int:
        """How many runs are unfinished, with those that wait for a search."""
        waiting = sum(not self.searched(*pair) for pair in self.comparison.pairs(tasks, methods))
        return len(self.ready(tasks, methods)) + waiting * len(self.comparison.seeds)
