"""Write docs/reference.md, the configuration reference, from docstrings, signatures and command lines."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import iconformer_mm
from iconformer_mm.engine import (
    AdapterCheckpointHook,
    AdapterStatisticsHook,
    BFloat16OptimWrapper,
    CheckedRunner,
    PEFTHook,
    PEFTOptimWrapperConstructor,
)
from iconformer_mm.files import written_whole
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.models import mmdet_backbones, mmpretrain_backbones, mmseg_backbones, mmseg_depth_head
from iconformer_mm.registry import PEFT_METHODS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / 'docs' / 'reference.md'
HEADER = """# Configuration reference

Generated from the docstrings, signatures and command lines of the package by
`python tools/docs_reference.py`; a test compares this page with what that writes now.

[Methods](#peft-methods) | [Hooks and the like](#hooks-and-the-like) | [Backbones and heads](#backbones-and-heads) |
[Functions](#functions) | [Prediction](#prediction) | [Command line](#command-line)
"""
HOOKS = (
    PEFTHook,
    AdapterCheckpointHook,
    AdapterStatisticsHook,
    PEFTOptimWrapperConstructor,
    BFloat16OptimWrapper,
    CheckedRunner,
)
LIBRARIES = {
    'mmpretrain': mmpretrain_backbones,
    'mmdet': mmdet_backbones,
    'mmseg': mmseg_backbones,
    'mmseg, depth': mmseg_depth_head,
}
TOOLS = (
    'train.py',
    'test.py',
    'predict.py',
    'inspect_model.py',
    'visualize_icon.py',
    'report.py',
    'find_lr.py',
    'adapter.py',
    'convert_adapter.py',
    'compare.py',
    'quickstart.py',
    'scenes.py',
    'export_backbone.py',
    'dataset_converters/make_scenes.py',
    'dataset_converters/nyu.py',
)


def first_paragraph(documented: Any) -> str:
    """The first paragraph of a docstring in one line, as Markdown."""
    return markdown(inspect.cleandoc(documented.__doc__ or '').split('\n\n')[0])


def markdown(text: str) -> str:
    """Text of a docstring as Markdown for a cell of a table."""
    text = re.sub(r':\w+:`~?([^`]+)`', r'`\1`', ' '.join(text.split()))
    return text.replace('``', '`').replace('|', r'\|')


def _ours(documented: Any) -> list[Any]:
    """What has a say in an argument's description: a function, or a class and its bases in this package."""
    if not isinstance(documented, type):
        return [] if documented is None else [documented]
    return [cls for cls in inspect.getmro(documented) if cls.__module__.startswith('iconformer_mm')]


def described_arguments(*documented: Any) -> dict[str, str]:
    """The arguments that Google docstrings describe, with what they say of them; the first one counts."""
    described: dict[str, str] = {}
    for source in (source for one in documented for source in _ours(one)):
        section = re.search(r'^Args:\n((?:    .*\n?|\n)+)', inspect.cleandoc(source.__doc__ or ''), re.MULTILINE)
        entries = re.findall(r'^    (\*{0,2}\w+): ((?:.*\n?)(?:     +.*\n?|\n)*)', section[1], re.M) if section else []
        for name, text in entries:
            # A plain default has a column of its own.
            described.setdefault(name, re.sub(r' Defaults to \S+$', '', markdown(text)))
    return described


def parameters_of(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of a function but for self and **kwargs, by name."""
    found = inspect.signature(function).parameters
    return {n: p for n, p in found.items() if n != 'self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def type_of(parameter: inspect.Parameter | None) -> str:
    """A parameter's type as a cell."""
    annotation = '' if parameter is None or parameter.annotation is parameter.empty else parameter.annotation
    return f'`{annotation}`'.replace('|', r'\|') if annotation else ''


def table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    titles = list(titles)
    lines = [titles, ['---'] * len(titles), *rows]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'


def method_section(name: str, method: type) -> str:
    """A PEFT method, its options with types and defaults."""
    adapter = getattr(method, 'adapter_class', None)
    described = described_arguments(method, adapter)
    parameters: dict[str, inspect.Parameter] = {}
    for source in (*_ours(method), *([adapter] if adapter else [])):
        if '__init__' in vars(source):
            parameters = {**parameters_of(source.__init__), **parameters}
    text = f'### `{name}`\n\n{first_paragraph(method)}\n'
    options = method.option_defaults()
    if not options:
        return f'{text}\nNo options.\n'
    rows = []
    for option, default in options.items():
        if option not in described:
            raise SystemExit(f"the option '{option}' of the PEFT method '{name}' is in no docstring")
        rows.append((f'`{option}`', type_of(parameters.get(option)), f'`{default!r}`', described[option]))
    return f'{text}\n{table(("option", "type", "default", ""), rows)}'


def call_section(title: str, documented: Any) -> str:
    """A class or a function, its arguments with types and defaults; of a class those that it adds to its parent's."""
    described = described_arguments(documented)
    function = documented
    if isinstance(documented, type):
        function = next((vars(cls)['__init__'] for cls in _ours(documented) if '__init__' in vars(cls)), None)
    rows = []
    for name, parameter in (parameters_of(function) if function else {}).items():
        default = 'required' if parameter.default is parameter.empty else f'`{parameter.default!r}`'
        rows.append((f'`{name}`', type_of(parameter), default, described.pop(name, '')))
    rows += [(f'`{name}`', '', '', text) for name, text in described.items()]  # *args and **kwargs
    if not rows:
        parent = next(cls for cls in inspect.getmro(documented) if cls not in _ours(documented))
        takes = f'Takes the arguments of `{parent.__module__}.{parent.__name__}`.'
        return f'### `{title}`\n\n{first_paragraph(documented)}\n{takes}\n'
    return f'### `{title}`\n\n{first_paragraph(documented)}\n\n{table(("argument", "type", "default", ""), rows)}'


def backbones_of(module: ModuleType) -> list[type]:
    """The classes that a module of backbones or heads defines."""
    return [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]


class _Captured(Exception):
    """Carries a tool's parser out of it."""


def parser_of(path: Path) -> argparse.ArgumentParser | None:
    """The command line of a tool, as it is when the tool begins to read it; None if it has none."""

    def capture(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        raise _Captured(parser)

    if not re.search(r'parser|import main', path.read_text(encoding='utf-8')):
        return None
    name = f'_command_line_of_{path.stem}'
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    with (
        patch.object(sys, 'path', [str(path.parent), *sys.path]),
        patch.object(argparse.ArgumentParser, 'parse_args', capture),
        patch('os.cpu_count', return_value=4),  # the page is the same on any machine
    ):
        try:
            spec.loader.exec_module(module)
            module.main()
        except _Captured as captured:
            return captured.args[0]
        finally:
            del sys.modules[name]
    return None


def command_section(title: str, parser: argparse.ArgumentParser, level: int = 3) -> str:
    """A command line: its arguments and options, and its commands."""
    rows, commands = [], ''
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            texts = {choice.dest: choice.help for choice in action._choices_actions}
            for name, command in action.choices.items():
                command.description = texts[name]
                commands += '\n' + command_section(f'{title} {name}', command, level + 1)
        elif action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            unset = action.default is None or action.default is False or action.default in ('', [], argparse.SUPPRESS)
            default = '' if unset else f'`{_plain(action.default)}`'
            choices = ', '.join(f'`{choice}`' for choice in action.choices or ())
            cells = (', '.join(f'`{s}`' for s in action.option_strings) or f'`{action.dest}`', choices, default)
            rows.append((*cells, markdown(action.help or '')))
    first = markdown((parser.description or '').strip().split('\n\n')[0])
    arguments = '\n' + table(('argument', 'choices', 'default', ''), rows) if rows else ''
    return f'{"#" * level} `{title}`\n\n{first}\n{arguments}{commands}'


def _plain(value: Any) -> str:
    """A default as one would type it."""
    return ' '.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def write_page() -> str:
    """The page's text."""
    rooms = {
        'PEFT methods': [method_section(name, method) for name, method in sorted(PEFT_METHODS.module_dict.items())],
        'Hooks and the like': [call_section(hook.__name__, hook) for hook in HOOKS],
        'Backbones and heads': [
            call_section(f'{library}: {part.__name__}', part)
            for library, module in LIBRARIES.items()
            for part in backbones_of(module)
        ],
        'Functions': [
            call_section(name, function)
            for name, function in vars(iconformer_mm).items()
            if name in iconformer_mm.__all__ and inspect.isfunction(function)
        ],
        'Prediction': [
            call_section('AdapterInferencer', AdapterInferencer),
            call_section('AdapterInferencer.__call__', AdapterInferencer.__call__),
        ],
        'Command line': [command_section(f'python tools/{name}', parser_of(ROOT / 'tools' / name)) for name in TOOLS],
    }
    return HEADER + ''.join(f'\n## {room}\n\n' + '\n'.join(sections) for room, sections in rooms.items())


def main() -> None:
    """Run the tool."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with written_whole(PAGE) as temporary:
        temporary.write_text(write_page(), encoding='utf-8')
    print(f'wrote {PAGE.relative_to(ROOT)}')


if __name__ == '__main__':
    main()
