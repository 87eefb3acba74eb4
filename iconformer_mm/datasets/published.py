"""Data sets of the benchmarks: what was published, where it goes, and unpacking it."""

from __future__ import annotations

import os
import tarfile
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from iconformer_mm.files import TEMPORARY, require_space

from .checks import DataError


@dataclass(frozen=True)
class Published:
    """A published data set.

    Attributes:
        folder: Where the configs look for it, below the root of all data.
        needed: Files and folders in there that a run reads.
        files: Address of each published file.
        base: Folder that archives are unpacked into, below the root. Defaults to ``''``: it is ``folder``.
        strip: Top folder of an archive that takes the place of ``folder``. Defaults to ``''``: none.
    """

    folder: str
    needed: tuple[str, ...]
    files: tuple[str, ...]
    base: str = ''
    strip: str = ''

    @property
    def names(self) -> list[str]:
        """Names of the published files."""
        return [address.rpartition('/')[2] for address in self.files]

    def missing(self, root: Path) -> list[str]:
        """What a run reads that is not there, or is an empty folder.

        Args:
            root: The root of all data.
        """
        return [name for name in self.needed if not _is_filled(root / self.folder / name)]

    def unpack(self, root: Path, archives: Path) -> None:
        """Bring the data to its place, from what was downloaded. What is there is left alone.

        Args:
            root: The root of all data.
            archives: Folder with the published files.

        Raises:
            DataError: A file is missing or damaged, or does not hold the data set.
            DiskFullError: There is too little space.
        """
        missing = self.missing(root)
        if not missing:
            return
        self.require(archives)
        target = root / (self.base or self.folder)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=TEMPORARY) as temporary:
            new = Path(temporary)
            for name in self.names:
                _extract(archives / name, new, target)
            source = new / self.strip if self.strip else new
            lacking = [name for name in missing if not _is_filled(source / name)]
            if lacking:
                raise DataError(
                    f'{", ".join(self.names)} in {archives} do not hold {", ".join(lacking)}: download again'
                )
            for name in missing:
                place = root / self.folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.is_dir():
                    place.rmdir()  # empty, else it is not missing
                os.replace(source / name, place)

    def require(self, archives: Path) -> None:
        """Check that the published files were downloaded.

        Args:
            archives: Folder with them.

        Raises:
            DataError: One is missing.
        """
        absent = [address for address in self.files if not (archives / address.rpartition('/')[2]).is_file()]
        if absent:
            raise DataError(f'download {" and ".join(absent)} into {archives}, then run this again')


PUBLISHED = {
    'cifar100': Published(
        'cifar100',
        ('cifar-100-python/train', 'cifar-100-python/test', 'cifar-100-python/meta'),
        ('https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz',),
    ),
    'svhn': Published(
        'svhn',
        ('train_32x32.mat', 'test_32x32.mat'),
        (
            'http://ufldl.stanford.edu/housenumbers/train_32x32.mat',
            'http://ufldl.stanford.edu/housenumbers/test_32x32.mat',
        ),
    ),
    'food101': Published(
        'food-101',
        ('images', 'meta/train.txt', 'meta/test.txt'),
        ('http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz',),
        strip='food-101',
    ),
    'coco': Published(
        'coco',
        ('train2017', 'val2017', 'annotations/instances_train2017.json', 'annotations/instances_val2017.json'),
        (
            'http://images.cocodataset.org/zips/train2017.zip',
            'http://images.cocodataset.org/zips/val2017.zip',
            'http://images.cocodataset.org/annotations/annotations_trainval2017.zip',
        ),
    ),
    'ade20k': Published(
        'ade/ADEChallengeData2016',
        ('images/training', 'images/validation', 'annotations/training', 'annotations/validation'),
        ('http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip',),
        base='ade',
        strip='ADEChallengeData2016',
    ),
    'nyu': Published(
        'nyu',
        ('images/train', 'images/test', 'annotations/train', 'annotations/test'),
        (
            'http://horatio.cs.nyu.edu/mit/silberman/nyu_depth_v2/nyu_depth_v2_labeled.mat',
            'http://horatio.cs.nyu.edu/mit/silberman/indoor_seg_sup/splits.mat',
        ),
    ),
}


def _is_filled(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _extract(archive: Path, new: Path, target: Path) -> None:
    """Unpack a file that holds nothing but files and folders below its own; one that is no archive is copied."""
    try:
        if archive.suffix == '.zip':
            with zipfile.ZipFile(archive) as content:
                _check_names(archive, content.namelist())
                require_space(target, sum(info.file_size for info in content.infolist()), f'unpacking {archive.name}')
                content.extractall(new)
        elif archive.name.endswith('.tar.gz'):
            with tarfile.open(archive) as packed:
                members = packed.getmembers()
                _check_names(archive, [m.name if m.isfile() or m.isdir() else '..' for m in members])
                require_space(target, sum(member.size for member in members), f'unpacking {archive.name}')
                packed.extraction_filter = getattr(tarfile, 'data_filter', None)  # Python 3.10.12, 3.11.4
                packed.extractall(new, members)
        else:
            _check_matlab(archive)
            require_space(target, archive.stat().st_size, f'copying {archive.name}')
            (new / archive.name).write_bytes(archive.read_bytes())
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and not isinstance(error, (zipfile.BadZipFile, tarfile.TarError)) and error.errno:
            raise
        if isinstance(error, ValueError):
            raise  # too little space
        raise DataError(f'{archive} is damaged ({error}); download it again') from error


def _check_names(archive: Path, names: list[str]) -> None:
    for name in names:
        if name.startswith('/') or '..' in PurePosixPath(name).parts:
            raise DataError(f'{archive} holds links or paths that lead out of it; it is not the published file')


def _check_matlab(path: Path) -> None:
    from scipy.io import loadmat

    try:
        found = set(loadmat(path, variable_names=['X', 'y']))  # a truncated one is found by reading it
    except Exception as error:  # scipy raises many exceptions for a damaged file
        raise DataError(f'{path} is damaged ({error}); download it again') from error
    if not {'X', 'y'} <= found:
        raise DataError(f'{path} is damaged or no SVHN file of cropped digits: it lacks X or y; download it again')
