"""Make weights to pre-train from of a backbone that another program published, recognised by its names.

iconformer convert-backbone dinov2_vitb14_pretrain.pth dinov2-base.safetensors --to mmpretrain
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pprint import pformat

from iconformer_mm.checkpoint import save_safetensors
from iconformer_mm.checkpoint.foreign_backbones import (
    FAMILIES,
    TARGETS,
    ConvertedBackbone,
    convert_backbone,
    read_backbone,
)
from iconformer_mm.files import expanded

from .errors import user_errors
from .parser import Parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        description=__doc__.partition('\n')[0],
        epilog=f'Known: {", ".join(FAMILIES)}, by their original names and those of Hugging Face. Nothing in the file '
        'is executed.',
    )
    parser.add_argument('checkpoint', type=expanded, help='the file: .safetensors, .pth or .bin of torch, .onnx')
    parser.add_argument('out', type=expanded, help='safetensors file to write')
    parser.add_argument('--to', dest='target', required=True, choices=TARGETS, help='whose names to give the tensors')
    parser.add_argument('--trust', action='store_true', help='unpickle the checkpoint even if that could execute code')
    return parser.parse_args(argv)


def describe(converted: ConvertedBackbone) -> str:
    """What was converted, what fits it, and what is left out, as text."""
    count = sum(value.numel() for value in converted.tensors.values())
    lines = [f'{converted.family} ({converted.source} names): {len(converted.tensors)} tensors, {count:,} values']
    config = pformat(converted.config, width=100, sort_dicts=False).replace('\n', '\n  ')
    lines += ['it fits', f'  {config}']
    lines += [f'note: {note}' for note in converted.notes]
    if converted.left:
        lines.append('not used:')
        for reason, number in Counter(converted.left.values()).items():
            names = [name for name, why in converted.left.items() if why == reason]
            lines.append(f'  {number} ({reason}): {", ".join(names[:4])}{", ..." if number > 4 else ""}')
    return '\n'.join(lines)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    if args.out.suffix != '.safetensors':
        raise ValueError(f'the file to write is a .safetensors file, got {args.out.name}')
    converted = convert_backbone(read_backbone(args.checkpoint, args.trust), args.target)
    notes = {'iconformer_mm.converted_from': f'{converted.family}, {converted.source}: {args.checkpoint.name}'}
    save_safetensors(converted.tensors, args.out, notes)
    print(f'{args.out}: {describe(converted)}')
