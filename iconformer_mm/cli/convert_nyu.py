"""Convert the official NYU-v2 labelled data set to the folders that mmseg's NYUDataset reads.

Takes ``nyu_depth_v2_labeled.mat`` (1,449 images with aligned depth in metres) and
``splits.mat`` (795 training and 654 test images) from
https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html, and writes
``images/{train,test}/<scene type>_<number>.jpg`` and
``annotations/{train,test}/<scene type>_<number>.png`` (16 bit, millimetres).
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import h5py  # type: ignore[import-untyped]
import numpy as np
from rich.progress import track
from scipy.io import loadmat

from .parser import Parser


def open_labelled(path: Path) -> h5py.File:
    """Open the labelled file, and see that it is one."""
    if not path.is_file():
        raise SystemExit(f'{path} does not exist; get nyu_depth_v2_labeled.mat from the NYU-v2 page')
    try:
        file = h5py.File(path, 'r')
    except OSError as error:
        raise SystemExit(f'{path} is not a valid MATLAB 7.3 file: {error}') from None
    lacking = {'images', 'depths', 'sceneTypes'} - set(file)
    if lacking:
        raise SystemExit(f'{path} is not the labelled data set of NYU-v2: it lacks {", ".join(sorted(lacking))}')
    images, depths = file['images'], file['depths']
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[:1] + images.shape[2:] != depths.shape:
        raise SystemExit(
            f'{path}: images {images.shape} and depths {depths.shape} do not match, expected (n, 3, 640, 480) and '
            '(n, 640, 480)'
        )
    return file


def read_splits(path: Path, count: int) -> dict[str, np.ndarray]:
    """Indices of the training and the test images, from 0."""
    if not path.is_file():
        raise SystemExit(f'{path} does not exist; get splits.mat from the NYU-v2 page')
    content = loadmat(path)
    try:
        splits = {name: content[f'{name}Ndxs'].reshape(-1).astype(int) - 1 for name in ('train', 'test')}
    except KeyError as error:
        raise SystemExit(f'{path} is not the splits file of NYU-v2: it lacks {error}') from None
    largest = max(indices.max() for indices in splits.values())
    if largest >= count:
        raise SystemExit(f'{path} names image {largest + 1}, there are {count}')
    return splits


def scene_type(file: h5py.File, index: int) -> str:
    """Name of an image's scene type, such as ``living_room``."""
    return ''.join(chr(code) for code in file[file['sceneTypes'][0, index]][:].reshape(-1))


def convert(file: h5py.File, splits: dict[str, np.ndarray], out: Path) -> None:
    """Write all images and depth maps."""
    for split, indices in splits.items():
        images, annotations = out / 'images' / split, out / 'annotations' / split
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for index in track(indices, split):
            # MATLAB keeps columns first: (3, W, H) and (W, H).
            image = file['images'][index].transpose(2, 1, 0)
            depth = file['depths'][index].T
            if not 0 <= depth.min() <= depth.max() < 65.5:
                raise SystemExit(
                    f'image {index + 1}: depths from {depth.min():.4g} to {depth.max():.4g} are not metres of a room'
                )
            name = f'{scene_type(file, index)}_{index + 1:04d}'
            cv2.imwrite(str(images / f'{name}.jpg'), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 98])
            cv2.imwrite(str(annotations / f'{name}.png'), np.round(depth * 1000).astype(np.uint16))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('labelled', type=Path, help='nyu_depth_v2_labeled.mat')
    parser.add_argument('splits', type=Path, help='splits.mat')
    parser.add_argument('--out', type=Path, default=Path('data/nyu'), help='folder to write (data/nyu)')
    args = parser.parse_args(argv)
    if args.out.exists():
        raise SystemExit(f'{args.out} exists already; remove it or give another --out')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open_labelled(args.labelled) as file:
        splits = read_splits(args.splits, len(file['images']))
        with tempfile.TemporaryDirectory(dir=args.out.parent) as temporary:
            convert(file, splits, Path(temporary) / 'nyu')
            os.replace(Path(temporary) / 'nyu', args.out)
    print(f'{args.out}: ' + ', '.join(f'{len(indices)} {name}' for name, indices in splits.items()))
