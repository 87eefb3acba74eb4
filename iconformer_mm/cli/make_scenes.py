"""Render the scene data sets: COCO, ADE20K, NYU-v2 and classification folders, in several styles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from iconformer_mm.datasets.scenes import STYLES, WRITERS, write_scenes

from .parser import Parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('data/scenes'), help='folder to write (data/scenes)')
    parser.add_argument('--styles', nargs='+', choices=STYLES, default=['source', 'target'])
    parser.add_argument('--formats', nargs='+', choices=list(WRITERS), default=list(WRITERS))
    parser.add_argument('--train', type=int, default=400, help='training scenes a style (400)')
    parser.add_argument('--val', type=int, default=100, help='validation scenes a style (100)')
    parser.add_argument('--size', type=int, nargs=2, default=(96, 128), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(argv)
    if args.train < 1 or args.val < 1 or min(args.size) < 32:
        raise SystemExit('at least one scene a split and 32 pixels a side are needed')
    for style in args.styles:
        write_scenes(args.out, style, args.formats, args.train, args.val, tuple(args.size), args.seed)
    print(f'wrote {args.out}')
