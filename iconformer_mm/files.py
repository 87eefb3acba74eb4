"""Paths, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Begins the names of folders in which files are written; what a killed process leaves can be told by it.
TEMPORARY = '.writing-'
_LOCK = '.lock'  # held by the process that writes in such a folder


class DiskFullError(OSError, ValueError):
    """There is too little space on the disk for what is to be written."""


def require_space(folder: Path, needed: int, what: str) -> None:
    """Check the free space before time is spent.

    Args:
        folder: Where will be written. It may not exist yet.
        needed: Bytes.
        what: What needs them, to begin the message with.

    Raises:
        DiskFullError: Less is free.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DiskFullError(
            f'{what} needs about {needed / 1e6:,.0f} MB in {folder}, of which {free / 1e6:,.0f} MB are free. Free '
            'some, or give another folder'
        )


def expanded(path: str | os.PathLike) -> Path:
    """A path whose ``~`` is the home folder, in reading as in writing."""
    return Path(os.path.expanduser(path))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary file to write, which takes the path's place when it is complete, or vanishes.

    The file's content and its entry in the folder are on the disk when it ends.

    Args:
        path: The file to write, ``~`` allowed. Missing folders are made.
    """
    path = expanded(path)
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        with open(temporary, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    for changed in [path.parent, *(new.parent for new in made)]:
        _sync_folder(changed)


@contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder to write in, which takes the path's place when it is complete, or vanishes.

    Args:
        path: The folder to write, ``~`` allowed. Missing folders above it are made.
    """
    path = expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f'{TEMPORARY}{path.name}.') as temporary:
        new = Path(temporary, 'new')
        new.mkdir()
        yield new
        if path.exists():
            os.replace(path, Path(temporary, 'old'))
        os.replace(new, path)


@contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A folder to write a file in, which others know to be in use by a lock; that of a killed process is free."""
    lock = None
    while lock is None:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f'{TEMPORARY}{path.name}.'))
        lock = _lock(folder)
    try:
        with lock:
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> IO | None:
    """Lock a folder; None if it was taken for an abandoned one and removed before that."""
    try:
        lock = open(folder / _LOCK, 'w')  # noqa: SIM115 (closed by who asked for it)
    except FileNotFoundError:
        return None
    if fcntl is not None:
        with suppress(OSError):  # on some network file systems
            fcntl.flock(lock, fcntl.LOCK_EX)
    if (folder / _LOCK).exists():
        return lock
    lock.close()
    return None


def _sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, where the system can."""
    if os.name == 'nt':
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no such call
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary folders that killed processes left; those in which another process writes stay.

    A writer holds a lock in its folder. Where there are no locks (Windows), nothing is removed.

    Args:
        folder: Where to look.
    """
    for path in folder.glob(f'{TEMPORARY}*') if fcntl is not None else ():
        with suppress(OSError):  # in use
            with suppress(FileNotFoundError), open(path / _LOCK, 'r+') as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            path.rmdir()  # the writer of an empty one that lives makes another


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all.

    Args:
        path: The file, ``~`` allowed. Missing folders are made.
        content: What to write.

    Raises:
        ValueError: A number in it is not finite.
    """
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + '\n', encoding='utf-8')
