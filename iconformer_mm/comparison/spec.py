"""A comparison of methods: its YAML file, and the runs it asks for."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Collection
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from iconformer_mm.checkpoint.real_base import fetch_base
from iconformer_mm.compat import config_folder

from .own_images import KEYS, expand_images

FETCHED = 'fetched:'
FETCHABLE = ('mmpretrain', 'mmseg', 'timm')
ROOT = config_folder('iconformer_mm').parent  # the checkout; of an installed package its .mim


class ComparisonError(ValueError):
    """A mistake in the YAML file, or a damaged result."""


@dataclass(frozen=True)
class Task:
    """What every method is tried on.

    Attributes:
        name: Its key in the YAML file.
        config: Config file, from the repository's root; its PEFTHook is replaced by the method's.
        base: File of the pre-trained weights, which frozen weights are compared with. ``'fetched:TARGET'`` stands for
            the DINOv2-S of :func:`iconformer_mm.checkpoint.real_base.fetch_base`, which the backbone then loads.
        metric: Name of the score in mmengine's log.
        title: Title of the score in tables and plots.
        learning_rates: The rates that are searched, for every method that has none of its own;
            a single one is taken as it is.
        rates_of: Name of another task. Every method takes the rate that the search found for it there, and nothing is
            searched here. Defaults to None.
        factor: What the score is multiplied by for tables and plots.
        digits: Digits after the point.
        higher_is_better: Whether a higher score is the better one.
        options: Settings that override the config's, in every run.
        search_options: Further ones in the search, such as other validation data.
        pictures: Images of the test data, by index, of which the predictions are drawn.
    """

    name: str
    config: str
    base: str
    metric: str
    title: str
    learning_rates: tuple[float, ...] = ()
    rates_of: str | None = None
    factor: float = 1.0
    digits: int = 1
    higher_is_better: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    search_options: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[int, ...] = ()

    def base_file(self) -> Path:
        """The file of the base, which is fetched if it is one to be fetched.

        Raises:
            FetchError: It cannot be fetched.
        """
        if self.base.startswith(FETCHED):
            return fetch_base(self.base.removeprefix(FETCHED))
        return ROOT / self.base

    def key(self, score: float | None) -> float:
        """Sorts scores, the best first; that of a diverged run, None, comes last."""
        if score is None:
            return math.inf
        return -score if self.higher_is_better else score


@dataclass(frozen=True)
class Method:
    """One of the compared methods.

    Attributes:
        name: Its key in the YAML file.
        title: Its name in tables and plots.
        method: Config of the PEFT method, for the backbone. None if there are ``methods``.
        tasks: Names of the tasks it is defined on.
        learning_rates: By task, rates in place of those of the task.
        options: Settings that override the config's and the task's.
        methods: In place of ``method`` a config for each module, with ``where``, as :func:`iconformer_mm.inject` takes
            them.
    """

    name: str
    title: str
    method: dict[str, Any] | None = None
    tasks: tuple[str, ...] = ()
    learning_rates: dict[str, tuple[float, ...]] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    methods: tuple[dict[str, Any], ...] = ()

    @property
    def type(self) -> str | None:
        """Name of the PEFT method; None of several for several modules."""
        return None if self.method is None else self.method['type']


@dataclass(frozen=True)
class Run:
    """One training run of a comparison: in the search of the learning rate, or one of the seeds."""

    task: Task
    method: Method
    learning_rate: float
    seed: int
    search: bool
    first: bool = True  # whether the seed is the first of the search

    @property
    def name(self) -> str:
        """``task/method/search_lr0.001`` or ``task/method/seed0``; of a further search seed ``..._seed101``."""
        if not self.search:
            return f'{self.task.name}/{self.method.name}/seed{self.seed}'
        name = f'{self.task.name}/{self.method.name}/search_lr{self.learning_rate:g}'
        return name if self.first else f'{name}_seed{self.seed}'

    @property
    def settings(self) -> dict[str, Any]:
        """All that determines the result."""
        options = {**self.task.options, **self.method.options, **(self.task.search_options if self.search else {})}
        method, methods = self.method.method, self.method.methods
        settings = dict(
            config=self.task.config,
            **(dict(methods=list(methods)) if method is None else dict(method=method)),
            learning_rate=self.learning_rate,
            seed=self.seed,
            metric=self.task.metric,
            options=options,
        )
        return {**settings, 'base': self.task.base} if self.task.base.startswith(FETCHED) else settings


@dataclass(frozen=True)
class Comparison:
    """Methods x tasks x seeds.

    Attributes:
        title: Title of the tables.
        seeds: Seeds of the runs that are compared.
        search_seed: Seed of the search, none of ``seeds``. The file may have a list.
        tasks: The tasks by name.
        methods: The methods by name.
        reference: Name of the method whose differences from the others are tabulated. Defaults to None: iCoN, or the
            first where that is not compared.
    """

    title: str
    seeds: tuple[int, ...]
    search_seed: tuple[int, ...]
    tasks: dict[str, Task]
    methods: dict[str, Method]
    reference: str | None = None

    @property
    def has_towers(self) -> bool:
        """Whether a method adapts more than the backbone, so that shares are those of all adapted modules."""
        return any(method.methods for method in self.methods.values())

    @property
    def held_out(self) -> list[Task]:
        """The tasks that take their rates from others; all tasks where none does."""
        return [task for task in self.tasks.values() if task.rates_of is not None] or list(self.tasks.values())

    def pairs(self, tasks: Collection[str], methods: Collection[str]) -> list[tuple[Task, Method]]:
        """The named tasks with each of the named methods that is defined there, task by task."""
        return [
            (task, method)
            for task in self.tasks.values()
            for method in self.methods.values()
            if task.name in tasks and method.name in methods and task.name in method.tasks
        ]

    def rates(self, task: Task, method: Method) -> tuple[float, ...]:
        """The learning rates that are searched for a method on a task; a single one is taken as it is."""
        task = self.searched_task(task)
        return method.learning_rates.get(task.name, task.learning_rates)

    def searched_task(self, task: Task) -> Task:
        """The task on which the learning rates of a task are searched: itself, or the one that ``rates_of`` names."""
        return task if task.rates_of is None else self.tasks[task.rates_of]

    def with_searched(self, names: Collection[str]) -> list[Task]:
        """The tasks of these names, and those on which their learning rates are searched."""
        searched = {self.searched_task(self.tasks[name]).name for name in names}
        return [task for task in self.tasks.values() if task.name in names or task.name in searched]

    def searches(self, task: Task, method: Method) -> list[Run]:
        """The search of a method's learning rate for a task; none of a single rate."""
        task = self.searched_task(task)
        rates = self.rates(task, method)
        if len(rates) == 1:
            return []
        seeds = self.search_seed
        return [Run(task, method, rate, seed, search=True, first=seed == seeds[0]) for rate in rates for seed in seeds]

    def runs(self, task: Task, method: Method, learning_rate: float) -> list[Run]:
        """The compared runs of a method on a task, at the rate that the search found."""
        return [Run(task, method, learning_rate, seed, search=False) for seed in self.seeds]


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    'tag:yaml.org,2002:float', re.compile(r'^[-+]?\d+(\.\d*)?[eE][-+]?\d+$'), list('-+0123456789')
)


def load_comparison(path: Path) -> Comparison:
    """Read a comparison's YAML file.

    Args:
        path: The file. The paths in it are relative to its folder.

    Raises:
        ComparisonError: The file is missing or no YAML, a key is unknown or missing, or a
            value is not what it should be.
    """
    try:
        content = yaml.load(path.read_text(encoding='utf-8'), _Loader)
    except OSError as error:
        raise ComparisonError(f'cannot read the comparison {path}: {error.strerror}') from None
    except yaml.YAMLError as error:
        raise ComparisonError(f'{path} is no YAML: {error}') from None
    try:
        return _comparison(content, path.parent)
    except ComparisonError as error:
        raise ComparisonError(f'{path}: {error}') from None


def _comparison(content: Any, folder: Path) -> Comparison:
    content = _check_keys('the file', content, Comparison)
    tasks = {name: _task(name, value, folder) for name, value in _dictionary('tasks', content['tasks']).items()}
    methods = {name: _method(name, value, tasks) for name, value in _dictionary('methods', content['methods']).items()}
    titles = [method.title for method in methods.values()]
    for title in titles:
        if titles.count(title) > 1:
            raise ComparisonError(f"two methods have the title '{title}'; give each its own")
    seeds = _list('seeds', content['seeds'], int)
    given = content['search_seed']
    search_seed = _list('search_seed', given if isinstance(given, list) else [given], int)
    for seed in search_seed:
        if seed in seeds:
            raise ComparisonError(f'search_seed {seed} is one of the seeds; the search needs a seed of its own')
    _check_rates(tasks, methods)
    reference = content.get('reference')
    if reference is not None and reference not in methods:
        raise ComparisonError(f"reference: unknown method '{reference}'{_hint(reference, methods)}")
    return Comparison(str(content['title']), seeds, search_seed, tasks, methods, reference)


def _check_rates(tasks: dict[str, Task], methods: dict[str, Method]) -> None:
    """Refuse tasks that take their rates from a task that has none for them."""
    for task in tasks.values():
        where, source = f'tasks.{task.name}.rates_of', task.rates_of
        if source is None:
            continue
        if source not in tasks:
            raise ComparisonError(f"{where}: unknown task '{source}'{_hint(source, tasks)}")
        if tasks[source].rates_of is not None:
            raise ComparisonError(f"{where}: task '{source}' has no rates of its own either")
        for method in methods.values():
            if task.name in method.tasks and source not in method.tasks:
                raise ComparisonError(f"{where}: method '{method.name}' is not compared on '{source}'")
            if task.name in method.learning_rates:
                raise ComparisonError(f'methods.{method.name}.learning_rates.{task.name}: the task has rates_of')


def _task(name: str, content: Any, folder: Path) -> Task:
    where = f'tasks.{name}'
    if 'images' in _dictionary(where, content):
        content = _expand_images(name, content, folder)
    content = _check_keys(where, content, Task, KEYS)
    content['config'] = _file(f'{where}.config', content['config'], folder)
    if str(content['base']).startswith(FETCHED):
        target = content['base'].removeprefix(FETCHED)
        if target not in FETCHABLE:
            raise ComparisonError(f"{where}.base: unknown target '{target}'{_hint(target, FETCHABLE)}")
    else:
        content['base'] = _file(f'{where}.base', content['base'], folder)
    if ('learning_rates' in content) == ('rates_of' in content):
        raise ComparisonError(f'{where} needs either learning_rates or rates_of')
    if 'learning_rates' in content:
        content['learning_rates'] = _list(f'{where}.learning_rates', content['learning_rates'], float)
    for key, kind in (('metric', str), ('title', str), ('factor', float), ('digits', int), ('higher_is_better', bool)):
        if key in content:
            content[key] = _value(f'{where}.{key}', content[key], kind)
    if 'pictures' in content:
        content['pictures'] = _list(f'{where}.pictures', content['pictures'], int)
    for key in ('options', 'search_options'):
        content[key] = _dictionary(f'{where}.{key}', content.get(key, {}))
    return Task(name, **content)


def _expand_images(name: str, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    for key in ('options', 'search_options'):
        _dictionary(f'tasks.{name}.{key}', content.get(key, {}))
    try:
        return expand_images(name, content, folder)
    except ValueError as error:
        raise ComparisonError(f'tasks.{name}: {error}') from None


def _method(name: str, content: Any, tasks: Collection[str]) -> Method:
    where = f'methods.{name}'
    content = _check_keys(where, content, Method)
    if ('method' in content) == ('methods' in content):
        raise ComparisonError(f'{where} needs either method or methods')
    if 'method' in content:
        method = _dictionary(f'{where}.method', content['method'])
        if 'type' not in method:
            raise ComparisonError(
                f'{where}.method needs a type, such as {{type: icon, bottleneck: 16}}; it is {method}'
            )
    else:
        content['methods'] = _methods(f'{where}.methods', content['methods'])
    content['tasks'] = _list(f'{where}.tasks', content.get('tasks', list(tasks)), str)
    for task in content['tasks']:
        if task not in tasks:
            raise ComparisonError(f"{where}.tasks: unknown task '{task}'{_hint(task, tasks)}")
    rates = _dictionary(f'{where}.learning_rates', content.get('learning_rates', {}))
    for task in rates:
        if task not in tasks:
            raise ComparisonError(f"{where}.learning_rates: unknown task '{task}'{_hint(task, tasks)}")
    content['learning_rates'] = {t: _list(f'{where}.learning_rates.{t}', rates[t], float) for t in rates}
    content['options'] = _dictionary(f'{where}.options', content.get('options', {}))
    return Method(name, **content)


def _methods(where: str, value: Any) -> tuple[dict[str, Any], ...]:
    """A method for each module. Which modules a model has is known when it is built."""
    entries = value if isinstance(value, list) else []
    if not entries or not all(isinstance(entry, dict) and {'where', 'type'} <= entry.keys() for entry in entries):
        raise ComparisonError(
            f'{where} must be a list of methods with where and type, such as '
            f'[{{where: backbone, type: icon}}, {{where: [encoder, decoder], type: lora}}]; it is {value!r}'
        )
    return tuple(entries)


def _check_keys(where: str, content: Any, form: type, hints: Collection[str] = ()) -> dict[str, Any]:
    """A copy of a dictionary whose keys are the fields of a dataclass, without the name.

    Args:
        where: What the dictionary is, for messages.
        content: The dictionary.
        form: The dataclass.
        hints: Further keys, which a misspelt one may stand for. Defaults to none.
    """
    content = _dictionary(where, content)
    known = [f.name for f in fields(form) if f.name != 'name']
    for key in content:
        if key not in known:
            raise ComparisonError(f"unknown key '{key}' in {where}{_hint(key, [*known, *hints])}")
    for f in fields(form):
        if f.name in known and f.name not in content and f.default is MISSING and f.default_factory is MISSING:
            raise ComparisonError(f"{where} lacks the key '{f.name}'")
    return dict(content)


def _dictionary(where: str, value: Any) -> dict:
    if not isinstance(value, dict):
        raise ComparisonError(f'{where} must be a dictionary, it is {value!r}')
    return value


def _list(where: str, value: Any, kind: type) -> tuple:
    """A list without doubles, of one type."""
    if not isinstance(value, list) or not value:
        raise ComparisonError(f'{where} must be a list with at least one entry, it is {value!r}')
    values = tuple(_value(where, item, kind) for item in value)
    if len(set(values)) < len(values):
        raise ComparisonError(f'{where} has an entry twice: {value}')
    return values


def _value(where: str, value: Any, kind: type) -> Any:
    kinds = (int, float) if kind is float else kind
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ComparisonError(f'{where} must be {kind.__name__}, it is {value!r}')
    return kind(value)


def _file(where: str, value: Any, folder: Path) -> str:
    """A file's path from the repository's root, where it lies within."""
    path = Path(os.path.abspath(folder / _value(where, value, str)))
    if not path.is_file():
        raise ComparisonError(f'{where}: there is no file {path} (paths are relative to the YAML file)')
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _hint(word: str, words: Collection[str]) -> str:
    near = difflib.get_close_matches(str(word), list(words), n=1)
    return f" (did you mean '{near[0]}'?)" if near else f'; known: {", ".join(words)}'
