"""The command line of the tools: a user's mistake ends as one line, with what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from traceback import walk_tb
from types import FrameType
from typing import Any, NoReturn

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.datasets.checks import DataError

_UNEXPECTED = re.compile(r"(\S+?)\(\) got an unexpected keyword argument '(\w+)'")
_UNREGISTERED = re.compile(r"'?(\S+) is not in the (\S+) registry")
# Read from a config by the runner's relatives, not by its constructor.
_MORE_SETTINGS = (
    'auto_scale_lr',
    'custom_imports',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'test_pipeline',
    'train_pipeline',
    'tta_model',
    'tta_pipeline',
)


def hint(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """The name that was probably meant, as what follows in a sentence; empty if none is near.

    Args:
        word: What was written.
        words: What there is.
        cutoff: How near, from 0 to 1. Defaults to 0.6.
    """
    near = difflib.get_close_matches(word, [str(w) for w in words], n=1, cutoff=cutoff)
    return f" (did you mean '{near[0]}'?)" if near else ''


def one_line(error: BaseException | str) -> str:
    """A message on one line, which any terminal can print."""
    text = str(error)
    if isinstance(error, KeyError) and error.args:  # str() would put it into quotation marks
        text = str(error.args[0])
    text = ' '.join(text.split()) or type(error).__name__
    return text.encode('utf-8', 'backslashreplace').decode('utf-8')


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line.

    Attributes:
        status: Exit status of a mistake.
    """

    status = 2
    _given: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As the library's; what was given is kept for the message of a mistake."""
        self._given = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End with one line."""
        known = set(_options(self))
        for word in self._given:
            name = word.partition('=')[0]
            if name.startswith('--') and name != '--' and not any(option.startswith(name) for option in known):
                message = f"unknown option '{name}'{hint(name, known) or f'; see {self.prog} --help'}"
                break
        self.exit(self.status, f'error: {one_line(message)}\n')


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """All options of a parser and of its commands."""
    yield from parser._option_string_actions
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)


class ConfigOptions(DictAction):
    """MMEngine's ``key=value``, with an error of the parser for what is not of that form."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Read the options."""
        for value in values:
            key, separator, _ = value.partition('=')
            if not separator or not key:
                parser.error(f"--cfg-options takes key=value, got '{value}'")
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError, IndexError) as error:
            parser.error(f'--cfg-options: {" ".join(values)} cannot be read: {error}')


def merge_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Override settings of a config, as ``--cfg-options`` does.

    Args:
        cfg: The config.
        options: Values by dotted names; None for none.

    Raises:
        ValueError: A name is probably misspelt, or stands for nothing that can be set.
    """
    if not options:
        return
    known = {*inspect.signature(Runner.__init__).parameters, *_MORE_SETTINGS, *cfg} - {'self', 'cfg'}
    for name in options:
        _check_name(cfg, name, known)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f'--cfg-options {" ".join(options)}: {one_line(error)}') from error


def _check_name(cfg: Config, name: str, known: Iterable[str]) -> None:
    """Refuse a name that would be taken by nobody.

    What a class is given is checked where it is built. Here is what nobody would look at: settings beside those of the
    runner, and keys of plain dictionaries that differ in a letter from one that is there.
    """
    first, *rest = name.split('.')
    if first not in known:
        raise ValueError(f"--cfg-options {name}: there is no setting '{first}'{hint(first, known)}")
    node = cfg.get(first)
    for index, key in enumerate(rest):
        if isinstance(node, (list, tuple)):
            if not key.isdigit() or int(key) >= len(node):
                raise ValueError(
                    f"--cfg-options {name}: '{key}' is none of the {len(node)} items, 0 to {len(node) - 1}"
                )
            node = node[int(key)]
            continue
        if not isinstance(node, dict):
            return
        last = index == len(rest) - 1
        if key not in node:
            near = hint(key, node, cutoff=0.8)
            if near and not (last and 'type' in node):
                raise ValueError(f"--cfg-options {name}: there is no '{key}'{near}")
            return
        node = node[key]


def user_errors(main: Callable[[], Any]) -> Callable[[], Any]:
    """Have a tool's ``main`` end with one line, without a traceback, where the user can mend what went wrong."""

    @functools.wraps(main)
    def run() -> Any:
        try:
            return main()
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            raise SystemExit(sentence) from None

    return run


def explain(error: BaseException) -> str | None:
    """One line on a mistake of the user's; None for an error that may be one of the program.

    Mistakes are what iconformer_mm says so of, and what the mm libraries' builders refuse: an unknown argument, or an
    unknown name of a class.
    """
    if isinstance(error, DataError):
        # What a data set's config is mistaken in is no fault of the data.
        mistake = _config_mistake(error.__cause__) if error.__cause__ else None
        return mistake or f'error in the data: {one_line(error)}'
    mistake = _config_mistake(error)
    if mistake is None and isinstance(error, (ValueError, FileNotFoundError, DamagedFileError)) and _is_ours(error):
        return f'error: {one_line(error)}'
    return mistake


def _config_mistake(error: BaseException) -> str | None:
    """One line on an argument or a class's name that is unknown to a builder; None for another error."""
    found = _UNEXPECTED.search(str(error))
    if isinstance(error, TypeError) and found:
        owner, argument = found.groups()
        target = _built(error) or _called(error, owner)
        name = getattr(target, '__name__', owner.removesuffix('.__init__'))
        return f"error: unknown option '{argument}' of {name}{hint(argument, accepted(target)) if target else ''}"
    found = _UNREGISTERED.search(str(error))
    if isinstance(error, KeyError) and found:
        name, registry = found.groups()
        return f"error: there is no '{name}' among the {registry} parts{hint(name, _registered(error))}"
    return None


def _frames(error: BaseException) -> Iterator[FrameType]:
    """The frames that an error came through, the innermost first; those of what caused it before its own."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    for each in reversed(chain):
        frames = [frame for frame, _ in walk_tb(each.__traceback__)]
        yield from reversed(frames)


def _is_ours(error: BaseException) -> bool:
    """Whether the package itself raised an error."""
    frames = [frame for frame, _ in walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get('__name__', '').partition('.')[0] == __package__


def _built(error: BaseException) -> Any:
    """The class that MMEngine was building, if it was."""
    for frame in _frames(error):
        if frame.f_code.co_name == 'build_from_cfg':
            return frame.f_locals.get('obj_cls')
    return None


def _called(error: BaseException, name: str) -> Any:
    """What was called by a name such as ``DataLoader.__init__``."""
    first, *rest = name.removesuffix('.__init__').split('.')
    for frame in _frames(error):
        target = frame.f_globals.get(first)
        for part in rest:
            target = getattr(target, part, None)
        if callable(target):
            return target
    return None


def _registered(error: BaseException) -> set[str]:
    """The names that a registry knows which did not know one."""
    for frame in _frames(error):
        registry = frame.f_locals.get('registry')
        if frame.f_code.co_name == 'build_from_cfg' and registry is not None:
            names: set[str] = set()
            while registry is not None:
                names |= registry.module_dict.keys()
                for child in registry.children.values():
                    names |= child.module_dict.keys()
                registry = registry.parent
            return names
    return set()


def accepted(target: Any) -> set[str]:
    """Names of the arguments that a class or a function takes; with ``**kwargs``, those of the base classes, too."""
    functions = [target]
    if isinstance(target, type):
        functions = [vars(base)['__init__'] for base in target.__mro__ if '__init__' in vars(base)]
    names: set[str] = set()
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            break
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {'self'}
