"""Which runs of a comparison are finished, and what they gave."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path

from .spec import Cell, Comparison, ComparisonError, Method, Task


class Board:
    """Which cells of a comparison are finished: those with a file of the same settings.

    Args:
        comparison: The comparison.
        folder: Folder of the files, ``<task>/<method>/<cell>.json``.

    Attributes:
        finished: What the files hold, by the cells' names.
        stale: Of cells whose file has other settings, the names of these.

    Raises:
        ComparisonError: A file is damaged.
    """

    def __init__(self, comparison: Comparison, folder: Path) -> None:
        self.comparison = comparison
        self.folder = folder
        self.finished: dict[str, dict] = {}
        self.stale: dict[str, list[str]] = {}
        self.refresh()

    def file(self, cell: Cell) -> Path:
        """Where a cell's result is."""
        return self.folder / f'{cell.name}.json'

    def refresh(self) -> None:
        """Look for files of cells that are not known to be finished."""
        for pair in self.comparison.pairs(self.comparison.tasks, self.comparison.methods):
            # The cells come one by one: with a search complete, its seeds follow.
            for cell in self.cells(*pair):
                if cell.name not in self.finished and self.file(cell).is_file():
                    self._read(cell)

    def _read(self, cell: Cell) -> None:
        try:
            content = json.loads(self.file(cell).read_text(encoding='utf-8'))
            found = content['settings']
        except (ValueError, KeyError, TypeError):
            raise ComparisonError(f'{self.file(cell)} is damaged; remove it, and it is run again') from None
        settings = json.loads(json.dumps(cell.settings))
        if found == settings:
            self.finished[cell.name] = content
            self.stale.pop(cell.name, None)
        else:
            self.stale[cell.name] = [key for key in settings if found.get(key) != settings[key]]

    def cells(self, task: Task, method: Method) -> Iterator[Cell]:
        """The search of a method on a task and, if that is finished and found a rate, the runs at it."""
        searches = self.comparison.searches(task, method)
        yield from searches
        if self.searched(task, method):
            best = self.best_rate(task, method)
            if best is not None:
                yield from self.comparison.runs(task, method, best)

    def searched(self, task: Task, method: Method) -> bool:
        """Whether all learning rates were tried."""
        return all(cell.name in self.finished for cell in self.comparison.searches(task, method))

    def best_rate(self, task: Task, method: Method) -> float | None:
        """The best learning rate of a finished search, of equal ones the smallest; None if all diverged."""
        if len(task.learning_rates) == 1:
            return task.learning_rates[0]
        scores = {
            cell.learning_rate: self.finished[cell.name]['score'] for cell in self.comparison.searches(task, method)
        }
        best = min(scores, key=lambda rate: (task.key(scores[rate]), rate))
        return None if scores[best] is None else best

    def results(self, task: Task, method: Method) -> list[dict]:
        """The finished runs of a method on a task, one a seed, without the search."""
        cells = self.cells(task, method)
        return [self.finished[cell.name] for cell in cells if not cell.search and cell.name in self.finished]

    def ready(self, tasks: Collection[str], methods: Collection[str]) -> list[Cell]:
        """The unfinished cells that could be run now, in order."""
        pairs = self.comparison.pairs(tasks, methods)
        return [cell for pair in pairs for cell in self.cells(*pair) if cell.name not in self.finished]

    def left(self, tasks: Collection[str], methods: Collection[str]) -> int:
        """How many cells are unfinished, with those that wait for a search."""
        waiting = sum(not self.searched(*pair) for pair in self.comparison.pairs(tasks, methods))
        return len(self.ready(tasks, methods)) + waiting * len(self.comparison.seeds)
