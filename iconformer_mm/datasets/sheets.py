"""A sheet of samples of a data set as it was written, to look at before training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.few_shot import image_files
from iconformer_mm.files import written_whole

CELL = 128  # pixels, side of a sample
TITLE = 14  # pixels, height of its title
_GREY = (128, 128, 128)

Sample = tuple[str, np.ndarray]  # title, (H, W, 3) uint8 RGB


def folder_samples(root: Path, number: int) -> Iterator[Sample]:
    """Samples of a folder with ``SPLIT/CLASS``: the splits and classes take turns."""
    folders = sorted((p for p in root.glob('*/*') if p.is_dir()), key=lambda p: (p.name, p.parent.name))
    images = {folder: image_files(folder) for folder in folders}
    for turn in range(number):
        for folder in _spread(folders, number):
            if turn < len(images[folder]):
                yield f'{folder.parent.name} {folder.name}', _read(images[folder][turn])


def semantic_samples(root: Path, number: int) -> Iterator[Sample]:
    """Samples of a data set in ADE20K's format, with the classes coloured."""
    classes = (root / 'classes.txt').read_text(encoding='utf-8').splitlines()
    colours = _colours(len(classes))
    for path in _spread(sorted((root / 'images').glob('*/*.jpg')), number):
        labels = np.asarray(Image.open(root / 'annotations' / path.parent.name / f'{path.stem}.png'))
        image = _read(path)
        shown = np.unique(labels[labels > 1])  # 1 is the background
        for label in shown:
            image = _tinted(image, labels == label, colours[label - 1])
        yield ', '.join(classes[label - 1] for label in shown) or classes[0], image


def instance_samples(root: Path, number: int) -> Iterator[Sample]:
    """Samples of a data set in COCO's format, with a colour for each object."""
    from pycocotools import mask as coco_mask

    chosen: list[tuple[Path, list[dict], dict[int, str]]] = []
    for file in sorted((root / 'annotations').glob('instances_*2017.json')):
        content = json.loads(file.read_text(encoding='utf-8'))
        names = {category['id']: category['name'] for category in content['categories']}
        objects: dict[int, list[dict]] = {}
        for annotation in content['annotations']:
            objects.setdefault(annotation['image_id'], []).append(annotation)
        folder = root / file.stem.removeprefix('instances_')
        chosen += [(folder / each['file_name'], objects.get(each['id'], []), names) for each in content['images']]
    for path, found, names in _spread(chosen, number):
        image = _read(path)
        for annotation, colour in zip(found, _colours(len(found))):
            image = _tinted(image, coco_mask.decode(annotation['segmentation']).astype(bool), colour)
        yield ', '.join(names[annotation['category_id']] for annotation in found), image


def write_sheet(path: Path, samples: Iterable[Sample], number: int = 48, columns: int = 8) -> None:
    """Write a PNG file with samples side by side, each with its title.

    Args:
        path: The file.
        samples: Titles and images, (H, W, 3), uint8.
        number: How many are taken. Defaults to 48.
        columns: How many beside one another. Defaults to 8.

    Raises:
        DataError: There are none.
    """
    chosen = [sample for _, sample in zip(range(number), samples)]
    if not chosen:
        raise DataError(f'there are no samples for {path}')
    rows = -(-len(chosen) // columns)
    sheet = Image.new('RGB', (columns * CELL, rows * (CELL + TITLE)), _GREY)
    draw = ImageDraw.Draw(sheet)
    for index, (title, pixels) in enumerate(chosen):
        left, top = index % columns * CELL, index // columns * (CELL + TITLE)
        scale = (CELL - 2) / max(pixels.shape[:2])
        height, width = (max(1, round(scale * n)) for n in pixels.shape[:2])
        # Small images stay sharp, so that their pixels can be seen.
        kind = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BILINEAR
        sheet.paste(Image.fromarray(pixels).resize((width, height), kind), (left, top))
        draw.text((left + 1, top + CELL - 1), title[: CELL // 6], fill=(255, 255, 255))
    with written_whole(path) as temporary:
        sheet.save(temporary, format='PNG')


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert('RGB'))


def _spread(items: Sequence, number: int) -> list:
    """Some of the items, from the first to the last."""
    chosen = np.linspace(0, len(items) - 1, min(number, len(items))).round().astype(int)
    return [items[i] for i in chosen]


def _colours(number: int) -> list[np.ndarray]:
    """Bright colours that differ, (3,) uint8 each."""
    hues = (np.arange(number) * 180 / max(number, 1)).astype(np.uint8)
    full = np.full_like(hues, 255)
    return list(cv2.cvtColor(np.stack([hues, full, full], axis=-1)[None], cv2.COLOR_HSV2RGB)[0]) if number else []


def _tinted(image: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """An image with a part in half a colour, and the edge of the part in all of it."""
    inner = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0).astype(bool)
    shares = np.where(mask & ~inner, 1.0, np.where(mask, 0.35, 0.0))[..., None]
    return ((1 - shares) * image + shares * colour).astype(np.uint8)
