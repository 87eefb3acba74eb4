"""The adapter files of a folder, which may change at any time."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from iconformer_mm.checkpoint import AdapterFileError, read_adapter
from iconformer_mm.files import expanded
from iconformer_mm.messages import hint, one_line

from .errors import RequestError

SUFFIX = '.safetensors'
_NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,99}')
_TRIES = 5


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter file at one moment.

    Attributes:
        name: Name of the adapter.
        path: The file.
        signature: What changes when the file does, without reading it.
        size: Bytes.
        version: Start of the SHA-256 of the file; None if the file could not be read.
        content: Metadata of the file; None if it was refused.
        refused: Why the adapter is not served; None if it is.
    """

    name: str
    path: Path
    signature: tuple[int, ...]
    size: int
    version: str | None = None
    content: dict[str, Any] | None = None
    refused: str | None = None

    def describe(self) -> dict[str, Any]:
        """What a client is told about it."""
        content = self.content or {}
        return dict(
            name=self.name,
            version=self.version,
            bytes=self.size,
            task=content.get('task'),
            method=content.get('method', {}).get('type'),
            classes=content.get('classes'),
            refused=self.refused,
        )


def signature_of(path: Path) -> tuple[int, ...]:
    """Return what changes when a file does.

    Raises:
        OSError: The file is gone.
    """
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_version(path: Path) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Read an adapter file, all of it from the same version of the file.

    Returns:
        The version (12 hexadecimal digits), the metadata and the tensors.

    Raises:
        AdapterFileError: It cannot be read, or changes all the time.
        FileNotFoundError: It is gone.
        OSError: It cannot be opened.
    """
    for _ in range(_TRIES):
        before = signature_of(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        try:
            content, tensors = read_adapter(path)
        except AdapterFileError:
            if signature_of(path) == before:
                raise
            continue
        if signature_of(path) == before:
            return digest, content, tensors
    raise AdapterFileError(f'{path} changes while it is read; write another file and rename it')


def check_readable(folder: str | os.PathLike) -> None:
    """Check that at least one file of a folder is an adapter file, if there are files at all.

    Raises:
        AdapterFileError: None is.
    """
    first = None
    for path in sorted(expanded(folder).glob(f'*{SUFFIX}')):
        try:
            read_version(path)
            return
        except (AdapterFileError, OSError) as error:
            first = first or error
    if first is not None:
        raise AdapterFileError(f'none of the adapter files in {folder} can be served: {first}')


class AdapterFolder:
    """The adapters of a folder, by name. Names are looked up, and never made into paths.

    Args:
        folder: The folder. Folders in it are not searched.
        check: Returns why an adapter with this metadata does not fit the base, or None if it does.
    """

    def __init__(self, folder: str | os.PathLike, check: Callable[[dict[str, Any]], str | None]) -> None:
        self._folder = expanded(folder)
        self._check = check
        self._entries: dict[str, AdapterEntry] = {}

    @property
    def entries(self) -> list[AdapterEntry]:
        """All adapters of the last scan, by name."""
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def scan(self) -> None:
        """Look at the folder. New and changed files are read and verified.

        A folder that cannot be listed is empty.
        """
        entries: dict[str, AdapterEntry] = {}
        for path in self._files():
            name = path.name.removesuffix(SUFFIX)
            try:
                signature = signature_of(path)
            except OSError:  # removed since
                continue
            known = self._entries.get(name)
            same = known is not None and known.signature == signature
            entry = known if same else self._entry(name, path, signature)
            if entry is not None:
                entries[name] = entry
        self._entries = entries

    def _files(self) -> list[Path]:
        try:
            return [path for path in self._folder.iterdir() if path.name.endswith(SUFFIX) and path.is_file()]
        except OSError:
            return []

    def _entry(self, name: str, path: Path, signature: tuple[int, ...]) -> AdapterEntry | None:
        """Read and verify a file; None if it is gone."""
        size = signature[2]
        if not _NAME.fullmatch(name):
            reason = 'its name must be letters, digits, dots, dashes and underscores, 100 at most'
            return AdapterEntry(one_line(name), path, signature, size, refused=reason)
        if not path.resolve().is_relative_to(self._folder.resolve()):
            return AdapterEntry(name, path, signature, size, refused='it is a link that leads out of the folder')
        try:
            version, content, _ = read_version(path)
        except FileNotFoundError:
            return None
        except (AdapterFileError, OSError) as error:
            return AdapterEntry(name, path, signature, size, refused=self._without_folder(error))
        refused = self._check(content)
        return AdapterEntry(name, path, signature, size, version, content, refused and self._without_folder(refused))

    def _without_folder(self, error: Exception | str) -> str:
        """A message without the path of the folder, which is not a client's business."""
        return one_line(one_line(error).replace(f'{self._folder}{os.sep}', ''))

    def refuse(self, entry: AdapterEntry, error: Exception) -> None:
        """Record that an adapter cannot be loaded, until its file changes."""
        known = self._entries.get(entry.name)
        if known is not None and known.signature == entry.signature:
            reason = self._without_folder(error)
            refused = AdapterEntry(
                entry.name, entry.path, entry.signature, entry.size, entry.version, entry.content, reason
            )
            self._entries = {**self._entries, entry.name: refused}

    def get(self, name: str) -> AdapterEntry:
        """Return an adapter by its name.

        Raises:
            RequestError: There is none, or it was refused.
        """
        entry = self._entries.get(name)
        if entry is None:
            served = [each.name for each in self._entries.values() if each.refused is None]
            meant = hint(name[:100], served) or '; GET /v1/adapters lists them'
            raise RequestError(404, 'unknown_adapter', f'there is no adapter {name[:100]!r}{meant}')
        if entry.refused is not None:
            raise RequestError(409, 'adapter_refused', f"adapter '{name}' is not served: {entry.refused}")
        return entry
