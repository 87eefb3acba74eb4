"""Writes the listing of the public API into docs/api.md.

python tools/list_api.py

What stands above the marker there is kept, what is below is made anew from the code.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from iconformer_mm.files import written_whole
from iconformer_mm.registry import PEFT_METHODS

PACKAGE = 'iconformer_mm'
MODULES = ('', '.adapters', '.checkpoint', '.comparison', '.engine', '.inference', '.ops', '.tuning')
REGISTRIES = (
    ('mmengine', 'HOOKS'),
    ('mmengine', 'OPTIM_WRAPPERS'),
    ('mmengine', 'OPTIM_WRAPPER_CONSTRUCTORS'),
    ('mmengine', 'RUNNERS'),
    ('mmpretrain', 'DATASETS'),
    ('mmpretrain', 'MODELS'),
    ('mmdet', 'MODELS'),
    ('mmseg', 'MODELS'),
)
GUIDE = Path(__file__).resolve().parents[1] / 'docs' / 'api.md'
MARKER = '<!-- What follows is written by tools/list_api.py -->\n'


class _Bare(str):
    """An annotation that is shown as it stands in the source."""

    def __repr__(self) -> str:
        return str(self)


def signature(function: Callable, bound: bool = False) -> str:
    """The signature of a function as in its source.

    Args:
        function: A function or a class.
        bound: Whether to leave the first argument out.
    """

    def bare(annotation: Any) -> Any:
        return _Bare(annotation) if isinstance(annotation, str) else annotation

    made = inspect.signature(function)
    parameters = [p.replace(annotation=bare(p.annotation)) for p in made.parameters.values()][bound:]
    returned = inspect.Signature.empty if inspect.isclass(function) else bare(made.return_annotation)
    return str(made.replace(parameters=parameters, return_annotation=returned))


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition('.')[0] == PACKAGE


def _members(cls: type, listed: Sequence[str]) -> Iterator[str]:
    """A line for each public method and property that neither a library nor a listed class asks for already."""
    others = [base for base in cls.__mro__[1:] if not _is_ours(base) or base.__name__ in listed]
    known = {name for base in others for name in vars(base) if _is_ours(base) or name != 'forward'}
    for base in cls.__mro__:
        if base in others:
            continue
        for name, member in vars(base).items():
            if name in known or (name.startswith('_') and name != '__call__'):
                continue
            if isinstance(member, property):
                yield f'    {name}: {signature(member.fget, True).removeprefix("() -> ")}'
            elif isinstance(member, (classmethod, staticmethod)):
                yield f'    {name}{signature(member.__func__, isinstance(member, classmethod))}'
            elif inspect.isfunction(member):
                yield f'    {name}{signature(member, True)}'


def describe(name: str, thing: Any, listed: Sequence[str]) -> list[str]:
    """The lines of one public name.

    Args:
        name: The name.
        thing: What it names.
        listed: All names listed with it.
    """
    if isinstance(thing, ModuleType):
        return [f'module {name}']
    if inspect.isclass(thing):
        owner = next((base for base in thing.__mro__ if '__init__' in vars(base)), thing)
        arguments = signature(thing) if _is_ours(owner) else f'(...)  # as {owner.__name__}'
        return [f'class {name}{arguments}', *_members(thing, listed)]
    if inspect.isfunction(thing):
        return [f'{name}{signature(thing)}']
    return [f'{name}: {type(thing).__name__}']


def registered(package: str, kind: str) -> list[str]:
    """Names of our classes in a package's registry."""
    registry = getattr(importlib.import_module(f'{package}.registry'), kind)
    registry.import_from_location()
    return sorted(name for name, cls in registry.module_dict.items() if inspect.isclass(cls) and _is_ours(cls))


def _block(lines: Iterable[str]) -> str:
    """Lines as they are, long ones broken between arguments."""
    kept = (': ', ' = ', ' | ', '-> ')
    broken = []
    for line in lines:
        for together in kept:
            line = line.replace(together, together.replace(' ', '\0'))
        line = textwrap.fill(line, 110, subsequent_indent=' ' * 8, break_on_hyphens=False, break_long_words=False)
        broken.append(line.replace('\0', ' '))
    return '```text\n' + '\n'.join(broken) + '\n```\n'


def listing() -> str:
    """The public API as Markdown."""
    parts = []
    for path in MODULES:
        module = importlib.import_module(PACKAGE + path)
        names = module.__all__
        lines = [line for name in names for line in describe(name, getattr(module, name), names)]
        parts.append(f'## `{PACKAGE}{path}`\n\n' + _block(lines))
    parts.append('## Names in registries\n\n| registry | names |\n|---|---|\n')
    for package, kind in REGISTRIES:
        names = ', '.join(f'`{name}`' for name in registered(package, kind))
        parts[-1] += f'| `{package}.registry.{kind}` | {names} |\n'
    lines = []
    for name, method in sorted(PEFT_METHODS.module_dict.items()):
        options = ', '.join(f'{option}={default!r}' for option, default in method.option_defaults().items())
        lines.append(f'{name}({options})')
    parts.append('## PEFT methods and their options\n\n' + _block(lines))
    return '\n' + '\n'.join(parts)


def main() -> None:
    """Write the listing."""
    head, marker, _ = GUIDE.read_text(encoding='utf-8').partition(MARKER)
    if not marker:
        raise SystemExit(f'{GUIDE} lacks the line {MARKER.strip()!r}, below which the listing goes')
    with written_whole(GUIDE) as temporary:
        temporary.write_text(head + marker + listing(), encoding='utf-8')


if __name__ == '__main__':
    main()
