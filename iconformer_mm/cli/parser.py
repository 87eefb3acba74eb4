"""The command line that the commands share."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from mmengine.config import Config, DictAction

from iconformer_mm.checkpoint.reading import guard_loading
from iconformer_mm.messages import hint, one_line

TRUST = '--trust-checkpoints'


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


def make_parser(description: str) -> argparse.ArgumentParser:
    """The command line that all tools have in common."""
    parser = Parser(description=description)
    parser.add_argument('config', help='config file, or library::path such as mmpretrain::vision_transformer/...')
    parser.add_argument('--work-dir', type=os.path.expanduser, help='folder for logs, checkpoints and metrics')
    parser.add_argument(
        '--peft',
        metavar='METHOD',
        help='adapt the model with this PEFT method, by name (icon) or by file (configs/_base_/peft/icon.py)',
    )
    parser.add_argument('--amp', action='store_true', help='run in mixed precision; bfloat16 on a CPU')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value, nested keys with dots, lists as key="[a,b]"',
    )
    parser.add_argument(
        TRUST, action='store_true', help='unpickle checkpoints (.pth) even if that could execute code in them'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def add_base(parser: argparse.ArgumentParser) -> None:
    """The option of the tools that resume or test: the base of an adapter checkpoint."""
    parser.add_argument(
        '--base',
        type=os.path.expanduser,
        help='checkpoint of the base weights, where an adapter checkpoint is resumed or tested whose run began with '
        "load_from (default: the config's load_from)",
    )


def load_by_command_line(cfg: Config, args: argparse.Namespace, checkpoint: str | None) -> None:
    """Have a checkpoint loaded in place of the config's ``load_from``, which remains the base.

    A base that only a checkpoint names is not opened. So what the config or ``--base`` names is handed to the
    AdapterCheckpointHook.

    Args:
        cfg: The config.
        args: The command line, with the options of :func:`add_base`.
        checkpoint: The checkpoint; None for the newest of the run.

    Raises:
        ValueError: There is a ``--base``, and the config has no AdapterCheckpointHook to take it.
    """
    options = args.cfg_options or {}
    base = args.base or options.pop('load_from', None) or cfg.get('load_from')
    cfg.load_from = checkpoint
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    hook_type = options.get('default_hooks.checkpoint.type', hook.get('type'))
    if getattr(hook_type, '__name__', hook_type) == 'AdapterCheckpointHook':
        if base is not None and (args.base or hook.get('base') is None):
            cfg.merge_from_dict({'default_hooks.checkpoint.base': base})
    elif args.base is not None:
        raise ValueError(
            '--base is for checkpoints of the AdapterCheckpointHook, which the config does not have '
            "(default_hooks.checkpoint.type); a checkpoint of MMEngine's CheckpointHook holds the base"
        )


def guard(args: argparse.Namespace) -> None:
    """Read no checkpoint in this process that could execute code, unless ``--trust-checkpoints`` says so."""
    guard_loading(args.trust_checkpoints, f'add {TRUST}')
