"""The files of a cache: shards of records, each written whole or not at all, and mapped into memory when read."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import torch

from iconformer_mm.checkpoint.safetensors_io import DamagedFileError, save_safetensors, shortened
from iconformer_mm.files import fcntl, remove_abandoned, write_json
from iconformer_mm.tuning.prefix import PrefixError

MANIFEST = 'cache.json'
FORMAT = 1
RESERVE = 1 << 30  # bytes that a cache leaves free on its disk
_KEY = 'iconformer_mm.prefix_cache'
_OPEN = 64  # shards that are mapped at a time


class Shards:
    """The folder of one cache.

    A record is one draw of one image. Records of a view lie in the order of the images, in shards of equal number.

    Args:
        folder: The folder.
        key: What the cache was made of, as a digest.
        images: Number of images.

    Attributes:
        per_shard: Records in a shard.
    """

    def __init__(self, folder: Path, key: str, images: int) -> None:
        self.folder = folder
        self.key = key
        self.images = images
        self.per_shard = 0
        self._mapped: OrderedDict[tuple[int, int], tuple[Any, list[int], list[int]]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the files themselves.
        return {**vars(self), '_mapped': OrderedDict()}

    def path(self, view: int, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / f'view{view:02}-{shard:05}.safetensors'

    def find(self) -> bool:
        """Read the manifest of a cache that was begun before.

        Returns:
            Whether there is one.

        Raises:
            DamagedFileError: It is damaged, or of another cache.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            if self.folder.is_dir() and any(self.folder.glob('view*')):
                raise DamagedFileError(
                    f'{self.folder} holds shards but no {MANIFEST}: it is no prefix cache, or a part of one. Delete '
                    'the folder, or name another one as `dir`'
                )
            return False
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            found = content['format'], content['key'], content['images'], content['per_shard']
            if not all(isinstance(n, int) and n > 0 for n in (found[0], *found[2:])):
                raise ValueError('a number is out of range')
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DamagedFileError(
                f'{path} is damaged ({type(error).__name__}: {shortened(str(error))}). Delete the folder '
                f'{self.folder}, and the cache is made again'
            ) from error
        if found[:3] != (FORMAT, self.key, self.images):
            raise DamagedFileError(
                f'{path} belongs to another cache than its folder: it was moved or copied here. Delete the folder '
                f'{self.folder}, and the cache is made again'
            )
        self.per_shard = found[3]
        return True

    def create(self, per_shard: int, description: Mapping[str, Any]) -> None:
        """Write the manifest.

        Args:
            per_shard: Records in a shard.
            description: What the cache is, for people.
        """
        self.per_shard = per_shard
        content = dict(format=FORMAT, key=self.key, images=self.images, per_shard=per_shard, made_of=dict(description))
        write_json(self.folder / MANIFEST, content)

    def all(self, views: int) -> list[tuple[int, int]]:
        """View and number of all shards of the first views."""
        return [(v, s) for v in range(views) for s in range(-(-self.images // self.per_shard))]

    def missing(self, views: int) -> list[tuple[int, int]]:
        """Those shards that are not there yet."""
        return [(v, s) for v, s in self.all(views) if not self.path(v, s).exists()]

    def range(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.images))

    def write(self, view: int, shard: int, records: Sequence[bytes]) -> None:
        """Write a shard.

        Raises:
            PrefixError: The disk is full, or the folder cannot be written.
        """
        tensors = dict(
            data=torch.frombuffer(bytearray(b''.join(records)), dtype=torch.uint8),
            ends=torch.tensor([len(r) for r in records]).cumsum(0),
            crc=torch.tensor([zlib.crc32(r) for r in records]),
        )
        path = self.path(view, shard)
        with clear_errors(path):
            save_safetensors(tensors, path, {_KEY: self.key})

    def check(self, views: int) -> None:
        """Map every shard once.

        Raises:
            DamagedFileError: One is truncated, altered or of another cache.
            FileNotFoundError: One is not there.
        """
        for view, shard in self.all(views):
            self._map(view, shard)

    def read(self, view: int, image: int) -> bytearray:
        """The bytes of a record.

        Raises:
            DamagedFileError: They were altered after they had been written.
        """
        shard, place = divmod(image, self.per_shard)
        file, ends, crc = self._map(view, shard)
        start = ends[place - 1] if place else 0
        data = bytearray(file.get_slice('data')[start : ends[place]].numpy().data)
        if zlib.crc32(data) != crc[place]:
            raise _damaged(self.path(view, shard), f'the record of image {image} was altered')
        return data

    def _map(self, view: int, shard: int) -> tuple[Any, list[int], list[int]]:
        if (view, shard) not in self._mapped:
            path = self.path(view, shard)
            try:
                file = safetensors.safe_open(path, framework='pt')
                key = (file.metadata() or {}).get(_KEY)
                ends, crc = (file.get_tensor(name).tolist() for name in ('ends', 'crc'))
                size = file.get_slice('data').get_shape()[0]
            except FileNotFoundError:
                raise FileNotFoundError(f'{path} is gone; the prefix cache is not complete any more') from None
            except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, IndexError) as error:
                raise _damaged(path, shortened(str(error))) from error
            if key != self.key or len(ends) != len(self.range(shard)) or len(crc) != len(ends):
                raise _damaged(path, 'it belongs to another cache')
            if sorted(ends) != ends or ends[-1] != size:
                raise _damaged(path, 'its records do not fill it')
            self._mapped[view, shard] = file, ends, crc
            while len(self._mapped) > _OPEN:
                self._mapped.popitem(last=False)
        return self._mapped[view, shard]


def _damaged(path: Path, why: str) -> DamagedFileError:
    return DamagedFileError(
        f'{path} is damaged: {why}. Delete this file, and the next run computes it again; the others are kept'
    )


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Say what to do where a cache cannot be written.

    Raises:
        PrefixError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PrefixError(
                f'the disk of {path.parent} is full. The shards of the prefix cache that are complete are kept: free '
                'some space and start again, or take fewer views, dtype="bfloat16", or another `dir`'
            ) from error
        raise PrefixError(
            f'the prefix cache cannot be written: {error.strerror or error} ({path.parent}). A complete cache may be '
            'read-only; to make one, name a `dir` that can be written'
        ) from error
    except safetensors.SafetensorError as error:  # what it makes of an error of the disk
        raise PrefixError(f'the prefix cache cannot be written: {error} ({path.parent})') from error


def check_space(folder: Path, needed: int, what: str) -> None:
    """Refuse a cache that does not fit on its disk.

    Args:
        folder: Where it would lie.
        needed: Bytes it would still take.
        what: What takes them, for the error.

    Raises:
        PrefixError: There is less space than that and :data:`RESERVE`.
    """
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed + RESERVE > free:
        raise PrefixError(
            f'prefix_cache: {what} would take {needed / 2**30:.1f} GiB, and the disk of {folder} has '
            f'{free / 2**30:.1f} GiB free, of which {RESERVE / 2**30:.0f} are left alone. Take fewer views, '
            "dtype='bfloat16', validation=False, or another `dir`"
        )


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Lock a cache while it is filled, so that runs side by side fill it once.

    Raises:
        PrefixError: The folder cannot be written.
    """
    with clear_errors(folder / '.lock'):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / '.lock', 'a')  # noqa: SIM115
    with lock:
        if fcntl is not None:
            with suppress(OSError):  # on some network file systems
                fcntl.flock(lock, fcntl.LOCK_EX)
        remove_abandoned(folder)
        yield


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(os.path.getsize(path) for path in folder.glob('*') if path.is_file())
