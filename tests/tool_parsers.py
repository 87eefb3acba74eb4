"""The parsers of the commands and tools, so that what the documentation types can be read without running it."""

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from unittest.mock import patch

from conftest import ROOT

from iconformer_mm.cli.main import main


class _Captured(Exception):
    """Carries a parser out of its program."""


def _capture(parser, *args, **kwargs):
    raise _Captured(parser)


def parser_of_command(name):
    """The parser of ``iconformer NAME``."""
    with patch.object(argparse.ArgumentParser, 'parse_args', _capture), patch.object(sys, 'argv', ['iconformer']):
        try:
            status = main([name])
        except _Captured as captured:
            return captured.args[0]
    raise AssertionError(f'iconformer {name} has no parser; it ended with {status}')


def parser_of_tool(name):
    """The parser of a script such as ``tools/train.py``; None if it has none."""
    path = Path(ROOT, name)
    if not re.search(r'parser|import main', path.read_text(encoding='utf-8')):
        return None
    module_name = f'_command_line_of_{path.stem}'
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    with (
        patch.object(sys, 'path', [str(path.parent), *sys.path]),
        patch.object(argparse.ArgumentParser, 'parse_args', _capture),
    ):
        try:
            spec.loader.exec_module(module)
            module.main()
        except _Captured as captured:
            return captured.args[0]
        finally:
            del sys.modules[module_name]
    return None
