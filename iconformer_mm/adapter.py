"""Adapter files on the command line: ``python -m iconformer_mm.adapter``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS, init_default_scope
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from iconformer_mm.checkpoint import (
    AdapterFileError,
    DamagedFileError,
    describe_adapter,
    hash_parameters,
    parse_adapter,
    read_safetensors,
    same_base,
    save_adapter,
    write_adapter,
)
from iconformer_mm.checkpoint.divergence import diverged_error, find_diverged
from iconformer_mm.checkpoint.reading import read_checkpoint, state_dict_of
from iconformer_mm.checkpoint.safetensors_io import expanded, written_whole
from iconformer_mm.checkpoint.training_checkpoint import check_note, decode_checkpoint, is_checkpoint, raw_state
from iconformer_mm.tuning import inject

BACKBONE = 'backbone.'
NOTE = 'iconformer_mm'  # where AdapterCheckpointHook keeps its own
FITS, DIFFERS, UNREADABLE = 0, 1, 2


class UserError(Exception):
    """A file or argument is not as it must be; the message says how."""


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
        (note['base_fingerprint'], note['base_parameters']),
        task=note['task'],
        classes=classes,
        notes={'epoch': checkpoint['meta'].get('epoch'), 'iter': checkpoint['meta'].get('iter'), **notes},
    )
    if note.get('scores'):
        content['notes']['scores'] = note['scores']
    return content, state


def _weights_of(checkpoint: dict[str, Any], raw: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights of a checkpoint, averaged ones where there are such, and a note of which they are."""
    if 'ema_state_dict' not in checkpoint:
        return checkpoint['state_dict'], {}
    if raw:
        return raw_state(checkpoint), dict(weights='raw')
    return checkpoint['state_dict'], dict(weights='averaged')


def read_base(path: Path, trust: bool) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint, without executing anything in it unless it is trusted."""
    if not path.is_file():
        raise UserError(f'{path} does not exist')
    return state_dict_of(read_checkpoint(path, trust, advice='add --trust-base'), path)


def base_state(content: dict[str, Any], state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The backbone of a base checkpoint, under the names in the backbone.

    Raises:
        UserError: Parameters of the adapter's base are missing.
    """
    prefixed = {n.removeprefix(BACKBONE): v for n, v in state.items() if n.startswith(BACKBONE)}
    backbone = prefixed or state
    missing = [name for name in content['base_parameters'] if name not in backbone]
    if missing:
        raise UserError(
            f'{path} lacks {len(missing)} of the {len(content["base_parameters"])} parameters of the base, such as '
            f'{missing[0]}. Give the checkpoint of a model, or of its backbone, with the names that the library uses'
        )
    return backbone


def check_base(content: dict[str, Any], backbone: dict[str, Tensor]) -> tuple[bool, str]:
    """Whether a backbone is the one that an adapter was trained on, and its fingerprint."""
    actual = hash_parameters({name: backbone[name] for name in content['base_parameters']})
    return same_base(content['base_fingerprint'], actual), actual


def info(args: argparse.Namespace) -> tuple[int, dict]:
    """Show what a file holds."""
    content, tensors = read_any(args.file)
    adapters = sum(v.numel() for n, v in tensors.items() if n.startswith(BACKBONE))
    result = {key: value for key, value in content.items() if key != 'base_parameters'}
    result.update(
        file=str(args.file),
        bytes=args.file.stat().st_size,
        tensors=len(tensors),
        adapter_parameters=adapters,
        other_parameters=sum(v.numel() for v in tensors.values()) - adapters,
        base_parameters=len(content['base_parameters']),
    )
    return FITS, result


def extract(args: argparse.Namespace) -> tuple[int, dict]:
    """Make an adapter file of a training checkpoint."""
    out = args.out or args.checkpoint.with_name(f'{args.checkpoint.stem}_adapter.safetensors')
    if args.checkpoint.suffix == '.safetensors':
        content, tensors = read_any(args.checkpoint, args.raw)
        if args.backbone_only:
            tensors = {n: v for n, v in tensors.items() if n.startswith(BACKBONE)}
        write_adapter(out, content, tensors)
    elif args.config is None:
        raise UserError('to extract from a checkpoint of the whole model, its --config is needed')
    else:
        from iconformer_mm.apis import load_config

        checkpoint = read_checkpoint(args.checkpoint, args.trust_base, advice='add --trust-base')
        state_dict_of(checkpoint, args.checkpoint)
        state, notes = _weights_of(checkpoint if 'state_dict' in checkpoint else dict(state_dict=checkpoint), args.raw)
        cfg = load_config(args.config)
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        hooks = [*cfg.get('custom_hooks', []), *cfg.get('default_hooks', {}).values()]
        methods = [hook['method'] for hook in hooks if hook and hook['type'] == 'PEFTHook']
        if methods:
            inject(model, methods[0])
        try:
            model.load_state_dict({name.removeprefix('module.'): value for name, value in state.items()})
        except RuntimeError as error:
            raise UserError(f'{args.checkpoint} is not of the model of {args.config}: {error}') from error
        save_adapter(model.backbone if args.backbone_only else model, out, metadata=notes)
    return FITS, dict(wrote=str(out), bytes=out.stat().st_size)


def apply(args: argparse.Namespace) -> tuple[int, dict]:
    """Make a checkpoint of the whole model of a base and an adapter."""
    content, tensors = read_any(args.adapter)
    backbone = base_state(content, read_base(args.base, args.trust_base), args.base)
    fits, actual = check_base(content, backbone)
    if not fits:
        raise UserError(_misfit(args.base, content, actual))
    state = {**{BACKBONE + name: value for name, value in backbone.items()}, **tensors}
    meta = dict(epoch=0, iter=0, iconformer_mm=content)
    with written_whole(args.out) as temporary:
        torch.save(dict(meta=meta, state_dict=state), temporary)
    return FITS, dict(wrote=str(args.out), bytes=args.out.stat().st_size, method=content['method'])


def diff(args: argparse.Namespace) -> tuple[int, dict]:
    """Compare two files."""
    (content_a, a), (content_b, b) = read_any(args.a), read_any(args.b)
    skipped = {'base_parameters', 'notes', 'package_version'}
    metadata = {
        key: [content_a.get(key), content_b.get(key)]
        for key in content_a.keys() | content_b.keys()
        if key not in skipped and content_a.get(key) != content_b.get(key)
    }
    changed, reshaped = {}, []
    for name in sorted(a.keys() & b.keys()):
        if a[name].shape != b[name].shape:
            reshaped.append(name)
        elif not torch.equal(a[name], b[name]):
            changed[name] = float((a[name].double() - b[name].double()).abs().max())
    result = dict(
        metadata=metadata,
        only_in_a=sorted(a.keys() - b.keys()),
        only_in_b=sorted(b.keys() - a.keys()),
        other_shape=reshaped,
        largest_difference=changed,
        equal_tensors=len(a.keys() & b.keys()) - len(changed) - len(reshaped),
    )
    same = not (metadata or result['only_in_a'] or result['only_in_b'] or reshaped or changed)
    return (FITS if same else DIFFERS), dict(same=same, **result)


def verify(args: argparse.Namespace) -> tuple[int, dict]:
    """Check that a file is intact and, with a base, that it belongs to it."""
    content, tensors = read_any(args.file)
    diverged = find_diverged(tensors)
    if diverged:
        raise UserError(f'{args.file} is of a training that diverged: {diverged_error(diverged)}')
    result: dict[str, Any] = dict(file=str(args.file), intact=True, tensors=len(tensors))
    if args.base is None:
        return FITS, result
    fits, actual = check_base(content, base_state(content, read_base(args.base, args.trust_base), args.base))
    result['fits_base'] = fits
    if not fits:
        result['reason'] = _misfit(args.base, content, actual)
    return (FITS if fits else DIFFERS), result


def _misfit(base: Path, content: dict[str, Any], actual: str) -> str:
    return (
        f'{base} is not the base the adapter was trained on: it has fingerprint {actual[:12]}, the adapter needs '
        f'{content["base_fingerprint"][:12]}'
    )


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument('--json', action='store_true', help='print JSON')
    trusting = argparse.ArgumentParser(add_help=False)
    trusting.add_argument(
        '--trust-base', action='store_true', help='unpickle a .pth file even if that could execute code in it'
    )
    parser = argparse.ArgumentParser(
        prog='adapter',
        description='Look at, extract, apply, compare and check adapter files and adapter checkpoints.',
        epilog='Exit status: 0 if all is well, 1 if files differ or do not belong together, 2 if one cannot be read.',
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
        table.add_row(key.replace('_', ' '), '-' if value is None else str(value))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool.

    Args:
        arguments: The command line. Defaults to the process's.

    Returns:
        The exit status.
    """
    args = parse_args(arguments)
    try:
        with redirect_stdout(sys.stderr):  # what the mm libraries print
            status, result = args.act(args)
    except (UserError, AdapterFileError, DamagedFileError, FileNotFoundError, ValueError) as error:
        if args.json:
            print(json.dumps(dict(error=str(error))))
        else:
            print(f'error: {error}', file=sys.stderr)
        return UNREADABLE
    if args.json:
        print(json.dumps(result))
    else:
        show(result, Console())
    return status


if __name__ == '__main__':
    sys.exit(main())
