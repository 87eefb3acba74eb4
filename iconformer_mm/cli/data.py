"""Write sets of real images: digits, Fashion-MNIST, textile defects, photographed objects, and a mixture.

What is needed is fetched by the name of a package, checked by SHA-256, and kept in ICONFORMER_MM_CACHE or
~/.cache/iconformer_mm. Every set is written twice: as it is, and as SET-conditions, with blur, noise, darkness or fog
from image to image. Beside each is a sheet of samples, SET.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from iconformer_mm.datasets.conditions import write_conditions
from iconformer_mm.datasets.few_shot import (
    find_fashion_mnist,
    find_textile,
    split_folder,
    write_digits,
    write_fashion_mnist,
    write_mixture,
)
from iconformer_mm.datasets.objects import SPLITS, split_sources, write_objects
from iconformer_mm.datasets.photographs import CATEGORIES, find_backgrounds, find_cutouts
from iconformer_mm.datasets.sheets import Sample, folder_samples, instance_samples, semantic_samples, write_sheet
from iconformer_mm.extras import require_extra
from iconformer_mm.fetching import cache_folder
from iconformer_mm.files import expanded, replaced_folder, require_space

from .errors import user_errors
from .parser import Parser

# What a mixture is made of.
CLASSIFICATION = ('digits', 'fashion-mnist', 'textile', 'objects')
FORMS = {'objects': 'classification', 'objects-semantic': 'semantic', 'objects-instance': 'instance'}
SETS = (*CLASSIFICATION, 'objects-semantic', 'objects-instance', 'mixture')
SAMPLES: dict[str, Callable[[Path, int], Iterator[Sample]]] = {
    'objects-semantic': semantic_samples,
    'objects-instance': instance_samples,
}


def write_set(name: str, out: Path, args: argparse.Namespace) -> None:
    """Write one set.

    Args:
        name: One of ``SETS``.
        out: The folder of all sets.
        args: The command line.
    """
    if name in FORMS:
        cutouts = args.cutouts or find_cutouts(cache_folder(), args.packages)
        backgrounds = args.backgrounds or find_backgrounds(cache_folder(), args.packages)
        numbers = (args.shots, args.val, args.test) if name == 'objects' else args.images
        parts = split_sources(cutouts, backgrounds)
        write_objects(out / name, FORMS[name], parts, dict(zip(SPLITS, numbers)), tuple(args.size), args.seed)
        return
    numbers = dict(shots=args.shots, most=args.test, val=args.val)
    with replaced_folder(out / name) as folder:
        if name == 'digits':
            write_digits(folder, **numbers)
        elif name == 'fashion-mnist':
            write_fashion_mnist(find_fashion_mnist(cache_folder(), args.packages), folder, **numbers)
        elif name == 'textile':
            split_folder(find_textile(cache_folder()), folder, seed=args.seed, **numbers)
        else:
            write_mixture({part: out / part for part in args.of}, folder)


def space_of(sets: Sequence[str], args: argparse.Namespace) -> int:
    """Bytes that the sets need, with their conditions; half as much again as measured."""
    own = args.cutouts is not None and args.cutouts.is_dir()
    categories = sum(path.is_dir() for path in args.cutouts.iterdir()) if own else len(CATEGORIES)
    each = args.shots + args.val + args.test

    def space(number: int, height: int, width: int) -> int:
        """Of images in two versions: up to 0.6 bytes a pixel, and a block on the disk."""
        return round(2 * number * (0.6 * height * width + 4096))

    bytes_of = {
        'digits': space(10 * each, 32, 32),
        'fashion-mnist': space(10 * each, 28, 28),
        'textile': space(3 * each, 250, 250),
        'objects': space(categories * each, *args.size),
        'objects-semantic': space(2 * sum(args.images), *args.size),
        'objects-instance': space(sum(args.images), *args.size),
    }
    bytes_of['mixture'] = sum(bytes_of[name] for name in args.of)
    return sum(bytes_of[name] for name in sets)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(description=__doc__)
    parser.add_argument('sets', nargs='+', metavar='SET', choices=(*SETS, 'all'), help=f'{", ".join(SETS)}, or all')
    parser.add_argument('--out', type=expanded, default=Path('data/real'), help='folder to write (data/real)')
    parser.add_argument('--shots', type=int, default=20, help='training images per class (20)')
    parser.add_argument('--val', type=int, default=20, help='validation images per class (20)')
    parser.add_argument('--test', type=int, default=100, help='test images per class, at most (100)')
    parser.add_argument(
        '--images',
        type=int,
        nargs=3,
        default=(400, 100, 200),
        metavar=('TRAIN', 'VAL', 'TEST'),
        help='images of objects-semantic and objects-instance (400 100 200)',
    )
    parser.add_argument(
        '--size',
        type=int,
        nargs=2,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
        help='of composed images in pixels (224 224)',
    )
    parser.add_argument('--seed', type=int, default=0, help='of what is drawn (0); objects keep to their splits')
    parser.add_argument(
        '--of', nargs='+', choices=CLASSIFICATION, default=list(CLASSIFICATION), help='sets of the mixture (all)'
    )
    parser.add_argument('--packages', type=expanded, help='folder with the .deb files, downloaded elsewhere')
    parser.add_argument('--cutouts', type=expanded, help='your own objects: one folder per category of PNG with alpha')
    parser.add_argument('--backgrounds', type=expanded, help='your own photographs behind them: one folder')
    args = parser.parse_args(argv)
    for name in ('shots', 'val', 'test'):
        if getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}')
    if min(args.images) < 1:
        parser.error(f'--images must be at least 1 each, got {" ".join(map(str, args.images))}')
    if min(args.size) < 64:
        parser.error(f'--size must be at least 64 each, got {args.size[0]} {args.size[1]}')
    if args.seed < 0:
        parser.error(f'--seed must be at least 0, got {args.seed}')
    if len(args.of) < 2:
        parser.error('--of needs two sets at least')
    sets = [name for name in SETS if name in args.sets or 'all' in args.sets]
    if 'mixture' in sets:
        # Its parts are written anew, so that all of it has the numbers asked for.
        sets = [name for name in SETS if name in sets or name in args.of]
    if 'digits' in sets:
        require_extra('quickstart', 'the set digits')
    if 'objects-instance' in sets:
        require_extra('det', "COCO's format")
    require_space(args.out, space_of(sets, args), f'writing {", ".join(sets)}')
    for name in sets:
        write_set(name, args.out, args)
        write_conditions(args.out / name, args.out / f'{name}-conditions', args.seed)
        for written in (name, f'{name}-conditions'):
            samples = SAMPLES.get(name, folder_samples)(args.out / written, 48)
            write_sheet(args.out / f'{written}.png', samples)
            print(f'{args.out / written}: look at {args.out / written}.png')
