"""A user's mistake ends a command with one line, with what was probably meant."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from traceback import walk_tb
from types import FrameType
from typing import Any

from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.datasets.checks import DataError
from iconformer_mm.extras import MissingExtraError
from iconformer_mm.messages import hint, one_line
from iconformer_mm.registry import accepted

_UNEXPECTED = re.compile(r"(\S+?)\(\) got an unexpected keyword argument '(\w+)'")
_UNREGISTERED = re.compile(r"'?(\S+) is not in the (\S+) registry")


def user_errors(main: Callable[..., Any]) -> Callable[..., Any]:
    """Have a tool's ``main`` end with one line, without a traceback, where the user can mend what went wrong."""

    @functools.wraps(main)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return main(*args, **kwargs)
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
    for each in (error, error.__cause__):
        if isinstance(each, MissingExtraError):
            return f'error: {one_line(each)}'
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
    return bool(frames) and frames[-1].f_globals.get('__name__', '').partition('.')[0] == __package__.partition('.')[0]


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
