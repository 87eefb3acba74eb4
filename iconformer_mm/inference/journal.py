"""What a run over many images has done so far, kept so that a run that ended early can go on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from iconformer_mm.files import expanded, write_json

_FOLDER = '.predictions'
_RUN = 'run.json'


def describe_file(path: str | os.PathLike | None) -> list[Any] | None:
    """Describe a file so that another one, or a changed one, can be told: its size and the time of its last change."""
    if path is None:
        return None
    path = expanded(path)
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def hash_text(text: str) -> str:
    """Return the start of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Journal:
    """Results of a run over images, in a folder of several processes. Each appends to a file of its own.

    Args:
        out: Folder of the run.
        run: What the results depend on, by a word for it.
    """

    def __init__(self, out: Path, run: Mapping[str, Any]) -> None:
        self._folder = out / _FOLDER
        self._run = dict(run)
        self._file: IO[str] | None = None

    def begin(self, restart: bool = False) -> None:
        """Make the folder, or go on with what a run that ended early left there. For one process.

        Args:
            restart: Whether to drop what is left. Defaults to False.

        Raises:
            ValueError: It is of another run.
        """
        if restart:
            self.remove()
        path = self._folder / _RUN
        known = self._read_run(path)
        if known is not None and known != self._run:
            differ = [name for name in self._run if known.get(name) != self._run[name]] or ['run']
            raise ValueError(
                f'{self._folder.parent} holds unfinished predictions of another run (other {" and ".join(differ)}); '
                'give another --out, or drop them with --restart'
            )
        if known is None:
            self.remove()
            write_json(path, self._run)

    @staticmethod
    def _read_run(path: Path) -> dict[str, Any] | None:
        try:
            return json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError):
            return None

    def append(self, image: Path, record: Mapping[str, Any]) -> None:
        """Keep the result of an image. It survives the end of the process.

        Args:
            image: The image.
            record: ``prediction`` or ``skipped``.

        Raises:
            ValueError: A number in it is not finite.
        """
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self._folder / f'{uuid.uuid4().hex}.jsonl', 'w', encoding='utf-8')  # noqa: SIM115
        line = dict(image=str(image), file=_signature(image), **record)
        self._file.write(json.dumps(line, allow_nan=False) + '\n')
        self._file.flush()

    def results(self, images: Iterable[Path]) -> dict[Path, dict[str, Any]]:
        """Return what is known about images that have not changed since.

        Args:
            images: The images.
        """
        images = list(images)
        current = {str(image): _signature(image) for image in images}
        known: dict[str, dict[str, Any]] = {}
        for path in self._folder.glob('*.jsonl'):
            for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
                try:
                    record = json.loads(line)
                    name, file = record['image'], record['file']
                except (ValueError, KeyError, TypeError):
                    continue  # cut off when its process was killed
                if file is not None and current.get(name) == file:  # else it changed, and there may be a later record
                    known[name] = record
        return {image: known[str(image)] for image in images if str(image) in known}

    def close(self) -> None:
        """Close the file of this process."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def remove(self) -> None:
        """Remove the folder."""
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)


def _signature(image: Path) -> list[int] | None:
    """Return what changes when an image does; None if it is gone."""
    try:
        status = image.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
