"""Render the scene data sets: COCO, ADE20K, NYU-v2 and classification folders, in several styles."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from rich.progress import track

from iconformer_mm.cli.parser import Parser
from iconformer_mm.datasets.scenes import STYLES, WRITERS, scenes

# Every part has scenes of its own: seeds never meet.
SEEDS = {
    ('source', 'train'): 0,
    ('source', 'val'): 1,
    ('target', 'train'): 2,
    ('target', 'val'): 3,
    ('mixed', 'train'): 1_000_002,
    ('mixed', 'val'): 1_000_003,
}


def main() -> None:
    """Run the tool."""
    parser = Parser(description=__doc__)
    parser.add_argument('--out', type=Path, default=Path('data/scenes'), help='folder to write (data/scenes)')
    parser.add_argument('--styles', nargs='+', choices=STYLES, default=['source', 'target'])
    parser.add_argument('--formats', nargs='+', choices=list(WRITERS), default=list(WRITERS))
    parser.add_argument('--train', type=int, default=400, help='training scenes a style (400)')
    parser.add_argument('--val', type=int, default=100, help='validation scenes a style (100)')
    parser.add_argument('--size', type=int, nargs=2, default=(96, 128), metavar=('HEIGHT', 'WIDTH'))
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    if args.train < 1 or args.val < 1 or min(args.size) < 32:
        raise SystemExit('at least one scene a split and 32 pixels a side are needed')

    for style in args.styles:
        for name in args.formats:
            folder = args.out / style / name
            folder.parent.mkdir(parents=True, exist_ok=True)
            # Complete or not there at all.
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                for split, number in (('train', args.train), ('val', args.val)):
                    seed = 4 * args.seed + SEEDS[style, split]
                    items = scenes(number, seed, style, tuple(args.size))
                    items = track(items, f'{style} {name} {split}', total=number)
                    WRITERS[name](Path(temporary) / name, split, items)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(Path(temporary) / name, folder)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main()
