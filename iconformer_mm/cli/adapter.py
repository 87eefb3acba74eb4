"""``iconformer adapter``: adapter files on the command line."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from iconformer_mm.checkpoint import (
    DamagedFileError,
    base_difference,
    describe_adapter,
    parse_adapter,
    read_safetensors,
    save_adapter,
    write_adapter,
)
from iconformer_mm.checkpoint.divergence import diverged_error, find_diverged
from iconformer_mm.checkpoint.reading import read_checkpoint, state_dict_of
from iconformer_mm.checkpoint.training_checkpoint import check_note, decode_checkpoint, is_checkpoint, raw_state
from iconformer_mm.checkpoint.tuned_state import file_names
from iconformer_mm.cli.parser import Parser
from iconformer_mm.files import expanded, written_whole
from iconformer_mm.messages import one_line
from iconformer_mm.tuning import get_injection, inject
from iconformer_mm.tuning.accounting import (
    LoadRecord,
    adopt_output_norms,
    check_training,
    recorded_training,
    require_all,
)
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import find_backbone

BACKBONE = 'backbone.'
BASE_KEYS = ('base_fingerprint', 'base_parameters', 'base_buffers_fingerprint', 'base_buffers')
NOTE = 'iconformer_mm'  # where AdapterCheckpointHook keeps its own
FITS, DIFFERS, FAILED = 0, 1, 3


class UserError(Exception):
    """A file or argument is not as it must be; the message says how."""


class AdapterParser(Parser):
    """Raises what is wrong on the command line, so that it ends as all errors do."""

    status = FAILED

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End, with a message in the error itself."""
        raise SystemExit(message or status)


def read_any(path: Path, raw: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter file or a training checkpoint as if it were one.

    Args:
        path: The file.
        raw: Whether to take the weights themselves of a checkpoint whose validation measured their average.
    """
    if not path.is_file():
        raise UserError(f'{path} does not exist')
    metadata, tensors = read_safetensors(path)
    if not is_checkpoint(metadata):
        return parse_adapter(metadata, path), tensors
    checkpoint = decode_checkpoint(metadata, tensors, str(path))
    note = checkpoint.get(NOTE)
    if note is None:
        raise UserError(f'{path} is a training checkpoint that AdapterCheckpointHook did not write')
    check_note(note, path)
    state, notes = _weights_of(checkpoint, raw or note.get('measured') == 'raw')
    classes = (checkpoint['meta'].get('dataset_meta') or {}).get('classes')
    content = describe_adapter(
        note['method'],
        note['sites'],
        {key: note[key] for key in BASE_KEYS if key in note},
        task=note['task'],
        classes=classes,
        notes={'epoch': checkpoint['meta'].get('epoch'), 'iter': checkpoint['meta'].get('iter'), **notes},
        selection=note.get('selection'),
        backbones=note.get('backbones'),
        base_dtype=note.get('base_dtype'),
    )
    if 'base_dtype' not in note:  # checkpoints of earlier releases do not say
        del content['base_dtype']
    if note.get('scores'):
        content['notes']['scores'] = note['scores']
    names = file_names(state, content['backbones'], note.get('heads') or ())
    return content, {names[name]: value for name, value in state.items()}


def _weights_of(checkpoint: dict[str, Any], raw: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a checkpoint, averaged ones where there are such, and a note of which they are."""
    if 'ema_state_dict' not in checkpoint:
        return checkpoint['state_dict'], {}
    if raw:
        return raw_state(checkpoint), dict(weights='raw')
    return checkpoint['state_dict'], dict(weights='averaged')


def prefix_of(content: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[str, ...]:
    """What the names of tensors in the backbones begin with, in a file."""
    paths = content.get('backbones', ['backbone'])
    if len(paths) == 1 and (not paths[0] or any(n.startswith(BACKBONE) and is_adapter(n) for n in tensors)):
        return (BACKBONE,)
    return tuple(f'{path}.' for path in paths)


def read_whole(path: Path, trust: bool) -> dict[str, Any]:
    """Read a checkpoint, without executing anything in it unless it is trusted."""
    if not path.is_file():
        raise UserError(f'{path} does not exist')
    checkpoint = read_checkpoint(path, trust, advice='add --trust-base')
    state = state_dict_of(checkpoint, path)
    return {**checkpoint, 'state_dict': state} if 'state_dict' in checkpoint else dict(state_dict=state)


def read_base(path: Path, trust: bool) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint, without executing anything in it unless it is trusted."""
    return read_whole(path, trust)['state_dict']


def load_whole(model: nn.Module, checkpoint: dict[str, Any], path: str) -> None:
    """Load a checkpoint that has to hold the whole model.

    Raises:
        WeightsError: It is of another PEFT method, or lacks a part of the model.
    """
    injection = get_injection(model)
    check_training(checkpoint, model, injection, path, whole=True)
    if injection is not None:
        adopt_output_norms(injection, (recorded_training(checkpoint) or {}).get('trained') or ())
    record = LoadRecord(model)
    load_state_dict(model, checkpoint['state_dict'], logger='silent')
    record.close()
    require_all(record, path)


def base_state(content: dict[str, Any], state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The backbone of a base checkpoint, under the names in the backbone.

    Raises:
        UserError: Tensors of the adapter's base are missing.
    """
    paths = content.get('backbones', ['backbone'])
    backbone = state  # of several, the names have their paths
    for path in dict.fromkeys([*paths, 'backbone']) if len(paths) == 1 else ():
        prefixed = {n.removeprefix(f'{path}.'): v for n, v in state.items() if n.startswith(f'{path}.')}
        if prefixed and path:
            backbone = prefixed
            break
    needed = [*content['base_parameters'], *content.get('base_buffers', [])]
    missing = [name for name in needed if name not in backbone]
    if missing:
        raise UserError(
            f'{path} lacks {len(missing)} of the {len(needed)} tensors of the base, such as '
            f'{missing[0]}. Give the checkpoint of a model, or of its backbone, with the names that the library uses'
        )
    return backbone


def info(args: argparse.Namespace) -> tuple[int, dict]:
    """Show what a file holds."""
    content, tensors = read_any(args.file)
    inside = [n for n in tensors if n.startswith(prefix_of(content, tensors))]
    adapters = sum(tensors[n].numel() for n in inside if is_adapter(n))
    unfrozen = sum(tensors[n].numel() for n in inside if not is_adapter(n))
    result = {key: value for key, value in content.items() if key not in ('base_parameters', 'base_buffers')}
    result.update(
        file=str(args.file),
        bytes=args.file.stat().st_size,
        tensors=len(tensors),
        adapter_parameters=adapters,
        unfrozen_parameters=unfrozen,
        other_parameters=sum(v.numel() for v in tensors.values()) - adapters - unfrozen,
        base_parameters=len(content['base_parameters']),
    )
    return FITS, result


def extract(args: argparse.Namespace) -> tuple[int, dict]:
    """Make an adapter file of a training checkpoint."""
    out = args.out or args.checkpoint.with_name(f'{args.checkpoint.stem}_adapter.safetensors')
    if args.checkpoint.suffix == '.safetensors':
        content, tensors = read_any(args.checkpoint, args.raw)
        if args.backbone_only:
            tensors = {n: v for n, v in tensors.items() if n.startswith(prefix_of(content, tensors))}
        write_adapter(out, content, tensors)
    elif args.config is None:
        raise UserError('to extract from a checkpoint of the whole model, its --config is needed')
    else:
        from iconformer_mm.engine import load_config
        from iconformer_mm.engine.config import method_of

        checkpoint = read_whole(args.checkpoint, args.trust_base)
        state, notes = _weights_of(checkpoint, args.raw)
        checkpoint['state_dict'] = {name.removeprefix('module.'): value for name, value in state.items()}
        cfg = load_config(args.config)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        method = method_of(cfg)
        if method is not None:
            inject(model, **method)
        load_whole(model, checkpoint, str(args.checkpoint))
        save_adapter(find_backbone(model) if args.backbone_only else model, out, metadata=notes)
    return FITS, dict(wrote=str(out), bytes=out.stat().st_size)


def apply(args: argparse.Namespace) -> tuple[int, dict]:
    """Make a checkpoint of the whole model of a base and an adapter."""
    content, tensors = read_any(args.adapter)
    backbone = base_state(content, read_base(args.base, args.trust_base), args.base)
    difference = base_difference(content, backbone)
    if difference is not None:
        raise UserError(_misfit(args.base, difference))
    paths = content.get('backbones', ['backbone'])
    inside = prefix_of(content, tensors)
    if len(paths) > 1:
        state = {**backbone, **tensors}
    else:
        # A backbone alone is written as that of a model, unless it has a classifier of its own.
        alone = '' if any(not n.startswith(inside) for n in tensors) else 'backbone'
        path = f'{paths[0] or alone}.'.removeprefix('.')
        state = {path + name: value for name, value in backbone.items()}
        state |= {path + n.removeprefix(inside[0]) if n.startswith(inside) else n: v for n, v in tensors.items()}
    meta = dict(epoch=0, iter=0, iconformer_mm=content)
    with written_whole(args.out) as temporary:
        torch.save(dict(meta=meta, state_dict=state), temporary)
    return FITS, dict(wrote=str(args.out), bytes=args.out.stat().st_size, method=content['method'])


def diff(args: argparse.Namespace) -> tuple[int, dict]:
    """Compare two files."""
    (content_a, a), (content_b, b) = read_any(args.a), read_any(args.b)
    skipped = {'base_parameters', 'base_buffers', 'notes', 'package_version'}
    metadata = {
        key: [content_a.get(key), content_b.get(key)]
        for key in content_a.keys() | content_b.keys()
        if key not in skipped and content_a.get(key) != content_b.get(key)
    }
    changed, reshaped, retyped = {}, [], []
    for name in sorted(a.keys() & b.keys()):
        if a[name].shape != b[name].shape:
            reshaped.append(name)
        elif a[name].dtype != b[name].dtype:
            retyped.append(name)
        elif not _same_bits(a[name], b[name]):
            changed[name] = float((a[name].double() - b[name].double()).abs().max())
    result = dict(
        metadata=metadata,
        only_in_a=sorted(a.keys() - b.keys()),
        only_in_b=sorted(b.keys() - a.keys()),
        other_shape=reshaped,
        other_type=retyped,
        largest_difference=changed,
        equal_tensors=len(a.keys() & b.keys()) - len(changed) - len(reshaped) - len(retyped),
    )
    same = not (metadata or result['only_in_a'] or result['only_in_b'] or reshaped or retyped or changed)
    return (FITS if same else DIFFERS), dict(same=same, **result)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype are the same, NaN being the same as itself."""
    return torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


def verify(args: argparse.Namespace) -> tuple[int, dict]:
    """Check that a file is intact and, with a base, that it belongs to it."""
    content, tensors = read_any(args.file)
    diverged = find_diverged(tensors)
    if diverged:
        raise UserError(f'{args.file} is of a training that diverged: {diverged_error(diverged)}')
    result: dict[str, Any] = dict(file=str(args.file), intact=True, tensors=len(tensors))
    if args.base is None:
        return FITS, result
    difference = base_difference(content, base_state(content, read_base(args.base, args.trust_base), args.base))
    result['fits_base'] = difference is None
    if difference is not None:
        result['reason'] = _misfit(args.base, difference)
    return (FITS if difference is None else DIFFERS), result


def _misfit(base: Path, difference: str) -> str:
    return f'{base} is not the base the adapter was trained on: {difference}'


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    shared = AdapterParser(add_help=False)
    shared.add_argument('--json', action='store_true', help='print JSON')
    trusting = AdapterParser(add_help=False)
    trusting.add_argument(
        '--trust-base', action='store_true', help='unpickle a .pth file even if that could execute code in it'
    )
    parser = AdapterParser(
        prog='iconformer adapter',
        description='Look at, extract, apply, compare and check adapter files and adapter checkpoints.',
        epilog='Exit status: 0 if all is well, 1 if files differ or do not belong together, 3 for whatever else went '
        'wrong: a file that is missing or cannot be read, or a mistake on the command line.',
    )
    commands = parser.add_subparsers(dest='command', required=True)

    command = commands.add_parser('info', parents=[shared], help='show what a file holds')
    command.add_argument('file', type=expanded)
    command.set_defaults(act=info)

    command = commands.add_parser('extract', parents=[shared, trusting], help='make an adapter file of a checkpoint')
    command.add_argument('checkpoint', type=expanded)
    command.add_argument('out', type=expanded, nargs='?', help='file to write (<checkpoint>_adapter.safetensors)')
    command.add_argument('--config', help='the config it was trained by; needed for a checkpoint of the whole model')
    command.add_argument('--backbone-only', action='store_true', help='leave neck and head out')
    command.add_argument(
        '--raw', action='store_true', help='of a run with EMAHook take the weights themselves, not their average'
    )
    command.set_defaults(act=extract)

    command = commands.add_parser('apply', parents=[shared, trusting], help='base and adapter make a whole checkpoint')
    command.add_argument('base', type=expanded, help='checkpoint of a model, or of its backbone')
    command.add_argument('adapter', type=expanded)
    command.add_argument('out', type=expanded, help='.pth file to write')
    command.set_defaults(act=apply)

    command = commands.add_parser('diff', parents=[shared], help='compare two files')
    command.add_argument('a', type=expanded)
    command.add_argument('b', type=expanded)
    command.set_defaults(act=diff)

    command = commands.add_parser('verify', parents=[shared, trusting], help='check a file, and whether it fits a base')
    command.add_argument('file', type=expanded)
    command.add_argument('--base', type=expanded, help='checkpoint of the base')
    command.set_defaults(act=verify)
    return parser.parse_args(arguments)


def show(result: dict[str, Any], console: Console) -> None:
    """Print a result as a table."""
    table = Table(box=SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style='bold', no_wrap=True)
    table.add_column(overflow='fold')
    for key, value in result.items():
        if isinstance(value, list) and len(value) > 8:
            value = f'{len(value)}: {", ".join(map(str, value[:4]))}, ..., {value[-1]}'
        elif isinstance(value, dict):
            value = '\n'.join(f'{k}: {v}' for k, v in value.items()) or '-'
        elif isinstance(value, list):
            value = ', '.join(map(str, value)) or '-'
        # As text: what a file says may look like markup.
        text = '-' if value is None else str(value).encode('utf-8', 'backslashreplace').decode('utf-8')
        table.add_row(key.replace('_', ' '), Text(text))
    console.print(table)


class PipedConsole(Console):
    """A console whose reader may go away, which is an error of its own."""

    def on_broken_pipe(self) -> None:
        """Let the error be, which Rich would end the process by with status 1."""
        raise BrokenPipeError


def as_json(value: Any) -> str:
    """JSON of a result. It knows no numbers that are not finite; they become their names."""

    def finite(node: Any) -> Any:
        if isinstance(node, dict):
            return {str(key): finite(child) for key, child in node.items()}
        if isinstance(node, (list, tuple)):
            return [finite(child) for child in node]
        if isinstance(node, float) and not math.isfinite(node):
            return 'NaN' if math.isnan(node) else 'Infinity' if node > 0 else '-Infinity'
        return node

    return json.dumps(finite(value), allow_nan=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        arguments: The command line. Defaults to the process's.

    Returns:
        The exit status: 0 if all is well, 1 if files differ or do not belong together, 3 for whatever else went
        wrong, which is then said in one line.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        args = parse_args(given)
    except SystemExit as end:
        return FITS if end.code in (None, 0) else _report(end, given)  # --help, or a mistake
    try:
        with redirect_stdout(sys.stderr):  # what the mm libraries print
            status, result = args.act(args)
        if args.json:
            print(as_json(result))
        else:
            show(result, PipedConsole())
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # who read the output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        return _report(error, given)


def _report(error: BaseException, given: Sequence[str]) -> int:
    """Say what went wrong, in one line, and as JSON where that was asked for."""
    message = one_line(error).removeprefix('error: ')
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        message = f'the program was ended with status {error.code}'
    elif not isinstance(error, (UserError, ValueError, OSError, SystemExit, DamagedFileError)):
        message = f'{type(error).__name__}: {message}'
    print(f'error: {message}', file=sys.stderr)
    if any(word.startswith('--j') for word in given):  # argparse takes what is shorter, too
        print(as_json(dict(error=message)))
    return FAILED
