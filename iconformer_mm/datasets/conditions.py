"""The same data set under conditions that change from image to image: blur, noise, darkness, fog (ours)."""

from __future__ import annotations

import shutil
from pathlib import Path
from zlib import crc32

import cv2
import numpy as np
from rich.progress import track

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.few_shot import SUFFIXES
from iconformer_mm.files import replaced_folder, write_json

CONDITIONS = ('clear', 'blurred', 'noisy', 'dark', 'foggy')
LABELS = 'annotations'  # folders of this name hold label maps, which stay as they are
RECORD = 'conditions.json'


def degrade(image: np.ndarray, condition: str, rng: np.random.Generator) -> np.ndarray:
    """Take an image under a condition, of a strength that is drawn.

    Args:
        image: (H, W) or (H, W, C), uint8.
        condition: One of ``CONDITIONS``. ``'blurred'``: a Gaussian whose deviation is 0.13 to 0.3 times the root of the
            shortest side, so 2 to 4.5 pixels of 224. ``'noisy'``: a deviation of 12 to 25 % of full scale.
            ``'dark'``: 12 to 35 % of the light, with a little noise. ``'foggy'``: 45 to 80 % of light grey fog,
            thicker in some places.
        rng: Source of all random choices.

    Returns:
        An image of the same shape and type.

    Raises:
        ValueError: The condition is unknown.
    """
    if condition not in CONDITIONS:
        raise ValueError(f'condition must be one of {", ".join(CONDITIONS)}, got {condition!r}')
    if condition == 'clear':
        return image
    pixels: np.ndarray = image.astype(np.float32) / 255
    if condition == 'blurred':
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.13, 0.3) * min(image.shape[:2]) ** 0.5)
    elif condition == 'noisy':
        pixels = pixels + rng.normal(0, rng.uniform(0.12, 0.25), size=image.shape)
    elif condition == 'dark':
        pixels = rng.uniform(0.12, 0.35) * pixels + rng.normal(0, 0.02, size=image.shape)
    else:
        height, width = image.shape[:2]
        places: np.ndarray = cv2.resize(
            rng.uniform(-0.15, 0.15, size=(4, 4)), (width, height), interpolation=cv2.INTER_CUBIC
        )
        fog = np.clip(rng.uniform(0.45, 0.8) + places, 0, 0.9)
        fog = fog.reshape(height, width, *[1] * (image.ndim - 2))
        pixels = (1 - fog) * pixels + fog * 0.8
    return np.clip(np.round(pixels * 255), 0, 255).astype(np.uint8)


def write_conditions(source: Path, target: Path, seed: int = 0) -> dict[str, str]:
    """Write a data set again, every image of it under a condition of its own. Labels stay as they are.

    Args:
        source: The data set: any folder of images, with label maps in folders named ``annotations``.
        target: The folder to write. It is complete or not there at all, and replaces one that is there. Its file
            ``conditions.json`` holds what is returned.
        seed: Of the conditions. An image's depends on its name and the seed, not on the others. Defaults to 0.

    Returns:
        The condition of each image, by its path in the folder.

    Raises:
        DataError: There are no images, or one is damaged or not of 8 bits.
    """
    files = sorted(path for path in source.rglob('*') if path.is_file()) if source.is_dir() else []
    images = [
        path for path in files if path.suffix.lower() in SUFFIXES and LABELS not in path.relative_to(source).parts
    ]
    if not images:
        raise DataError(f'{source} holds no images')
    found = {}
    with replaced_folder(target) as folder:
        for folder_of in {path.parent for path in files}:
            (folder / folder_of.relative_to(source)).mkdir(parents=True, exist_ok=True)
        for path in {*files} - {*images}:
            shutil.copy(path, folder / path.relative_to(source))
        for path in track(images, f'conditions of {source.name}'):
            name = path.relative_to(source).as_posix()
            rng = np.random.default_rng([seed, crc32(name.encode())])
            found[name] = CONDITIONS[rng.integers(len(CONDITIONS))]
            image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            if image is None or image.dtype != np.uint8:
                raise DataError(f'{path} cannot be read as an image of 8 bits')
            if not cv2.imwrite(str(folder / name), degrade(image, found[name], rng), [cv2.IMWRITE_JPEG_QUALITY, 95]):
                raise OSError(f'{folder / name} could not be written')
        write_json(folder / RECORD, found)
    return found
