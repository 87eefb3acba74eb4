"""Small rendered scenes with exact depth, masks and labels, in the formats of real data sets (ours).

Flat textured shapes stand upright on a ground plane in front of a wall, at
different distances, and occlude one another. Everything is drawn from a seed, so
any benchmark's pipeline runs without a download. The styles ``'source'``,
``'target'`` and ``'mixed'`` differ in colour, light, texture and haze, but not in
geometry. ``'mixed'`` is the target style under conditions that change from scene
to scene.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np
from rich.progress import track

SHAPES = ('disc', 'box', 'cone', 'diamond', 'cross')
SURFACES = ('wall', 'floor')
CLASSES = SURFACES + SHAPES
STYLES = ('source', 'target', 'mixed')
CONDITIONS = ('clear', 'blurred', 'noisy', 'dark')  # of the mixed style

CAMERA_HEIGHT = 1.4  # metres
NEAREST = 1.8  # metres, smallest distance of an object
WALL = (6.5, 9.5)  # metres, range of the wall's distance; below NYU-v2's limit of 10 m


class Labelled(Protocol):
    """What the formats of segmentation hold of an image. The attributes are those of :class:`Scene`."""

    image: np.ndarray
    semantic: np.ndarray
    masks: list[np.ndarray]
    labels: list[int]


@dataclass
class Scene:
    """One rendered scene.

    Attributes:
        image: (H, W, 3), uint8, RGB.
        depth: (H, W), float32, metres along the optical axis.
        semantic: (H, W), uint8, indices into :data:`CLASSES`.
        masks: Visible mask of each object, (H, W), bool.
        labels: Index of each object's shape in :data:`SHAPES`.
    """

    image: np.ndarray
    depth: np.ndarray
    semantic: np.ndarray
    masks: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


def _shape_polygon(shape: str) -> np.ndarray:
    """Return the outline of a shape of height 1 that stands on the origin: x right, y up."""
    if shape == 'disc':
        angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        return np.stack([0.5 * np.cos(angles), 0.5 + 0.5 * np.sin(angles)], axis=1)
    return np.array(
        {
            'box': [(-0.4, 0), (0.4, 0), (0.4, 1), (-0.4, 1)],
            'cone': [(-0.5, 0), (0.5, 0), (0, 1)],
            'diamond': [(0, 0), (0.45, 0.5), (0, 1), (-0.45, 0.5)],
            'cross': [
                (-0.17, 0), (0.17, 0), (0.17, 0.33), (0.5, 0.33), (0.5, 0.67), (0.17, 0.67),
                (0.17, 1), (-0.17, 1), (-0.17, 0.67), (-0.5, 0.67), (-0.5, 0.33), (-0.17, 0.33),
            ],
        }[shape]
    )  # fmt: skip


def _colour(rng: np.random.Generator, style: str) -> np.ndarray:
    """Draw an RGB colour in [0, 1]: vivid in the source style, dull and warm in the others."""
    hue, saturation, value = rng.uniform(0, 180), rng.uniform(0.6, 1), rng.uniform(0.6, 1)
    if style != 'source':
        saturation, value = 0.4 * saturation, 0.75 * value
    pixel = np.array([[[hue, 255 * saturation, 255 * value]]]).astype(np.uint8)
    colour = cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0] / 255
    return colour * ([1.0, 1.0, 1.0] if style == 'source' else [1.0, 0.9, 0.75])


def _texture(rng: np.random.Generator, style: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return colours (..., 3) of surface points (u, v) in metres: plain, stripes, checks or dots."""
    period = rng.uniform(0.15, 0.5)
    angle = rng.uniform(0, np.pi)
    s = (np.cos(angle) * u + np.sin(angle) * v) / period
    t = (np.cos(angle) * v - np.sin(angle) * u) / period
    kind = rng.integers(4)
    if kind == 0:
        pattern = np.zeros_like(s)
    elif kind == 1:
        pattern = (np.floor(s) % 2).astype(float)
    elif kind == 2:
        pattern = ((np.floor(s) + np.floor(t)) % 2).astype(float)
    else:
        pattern = ((s % 1 - 0.5) ** 2 + (t % 1 - 0.5) ** 2 < 0.09).astype(float)
    contrast = 0.5 if style == 'source' else 1.0
    first, second = _colour(rng, style), _colour(rng, style)
    return first + contrast * pattern[..., None] * (second - first)


def render_scene(
    rng: np.random.Generator, style: str = 'source', size: tuple[int, int] = (96, 128), max_objects: int = 6
) -> Scene:
    """Render one scene.

    Args:
        rng: Source of all random choices.
        style: ``'source'``, ``'target'`` or ``'mixed'``. Defaults to ``'source'``.
        size: Height and width in pixels. Defaults to (96, 128).
        max_objects: Maximum number of objects; at least one is placed. Objects
            with fewer than 12 visible pixels are left out of ``masks`` and
            ``labels``, but stay in the image and the other maps. Defaults to 6.

    Raises:
        ValueError: The style is unknown.
    """
    if style not in STYLES:
        raise ValueError(f'style must be one of {", ".join(STYLES)}, got {style!r}')
    height, width = size
    focal = 0.9 * width
    horizon = rng.uniform(0.3, 0.45) * height
    wall = rng.uniform(*WALL)
    rows, columns = np.mgrid[:height, :width].astype(np.float64) + 0.5

    # The ray hits the ground if it meets it before the wall.
    with np.errstate(divide='ignore'):
        ground = CAMERA_HEIGHT * focal / (rows - horizon)
    on_ground = (ground > 0) & (ground < wall)
    depth = np.where(on_ground, ground, wall)
    semantic = np.where(on_ground, CLASSES.index('floor'), CLASSES.index('wall')).astype(np.uint8)
    x = (columns - width / 2) * depth / focal
    y = CAMERA_HEIGHT - (rows - horizon) * depth / focal  # above the ground
    image = np.where(on_ground[..., None], _texture(rng, style, x, depth), _texture(rng, style, x, y))

    owner = np.full(size, -1)
    labels = []
    distances = np.sort(rng.uniform(NEAREST, wall - 0.4, size=rng.integers(1, max_objects + 1)))[::-1]
    for index, distance in enumerate(distances):  # the farthest first, so that nearer objects occlude it
        label = int(rng.integers(len(SHAPES)))
        tall = rng.uniform(0.6, 1.5)
        place = rng.uniform(-0.5, 0.5) * width * distance / focal
        outline = _shape_polygon(SHAPES[label]) * tall
        pixels = np.stack(
            [
                width / 2 + (outline[:, 0] + place) * focal / distance,
                horizon + (CAMERA_HEIGHT - outline[:, 1]) * focal / distance,
            ],
            axis=1,
        )
        mask = np.zeros(size, np.uint8)
        cv2.fillPoly(mask, [np.round((pixels - 0.5) * 16).astype(np.int32)], 1, shift=4)
        inside = mask.astype(bool)
        u = (columns - width / 2) * distance / focal
        v = (rows - horizon) * distance / focal
        image[inside] = _texture(rng, style, u, v)[inside]
        depth[inside] = distance
        semantic[inside] = CLASSES.index(SHAPES[label])
        owner[inside] = index
        labels.append(label)

    scene = Scene(_light(rng, style, image, depth), depth.astype(np.float32), semantic)
    for index, label in enumerate(labels):
        visible = owner == index
        if visible.sum() >= 12:
            scene.masks.append(visible)
            scene.labels.append(label)
    return scene


def _light(rng: np.random.Generator, style: str, image: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Add light from one side and noise. Except in the source style, also add haze with distance and blur."""
    height, width = depth.shape
    side = np.linspace(-1, 1, width) * rng.uniform(-0.25, 0.25) + rng.uniform(0.85, 1.05)
    image = image * side[None, :, None]
    if style == 'source':
        image = image + rng.normal(0, 0.01, size=image.shape)
    else:
        condition = CONDITIONS[rng.integers(len(CONDITIONS))] if style == 'mixed' else 'clear'
        haze = 1 - np.exp(-depth / rng.uniform(8, 14))
        image = image + haze[..., None] * (np.array([0.75, 0.78, 0.85]) - image)
        if condition == 'dark':
            image = 0.4 * image
        blur = rng.uniform(1.5, 2.5) if condition == 'blurred' else rng.uniform(0.4, 0.9)
        image = cv2.GaussianBlur(image, (0, 0), blur)
        noise = rng.uniform(0.12, 0.2) if condition == 'noisy' else 0.03
        image = image + rng.normal(0, noise, size=image.shape)
    return np.clip(image * 255, 0, 255).astype(np.uint8)


def scenes(
    number: int, seed: int, style: str = 'source', size: tuple[int, int] = (96, 128), max_objects: int = 6
) -> Iterator[Scene]:
    """Render scenes. Each has its own random stream, so scene ``i`` does not depend on their number."""
    for index in range(number):
        yield render_scene(np.random.default_rng([seed, index]), style, size, max_objects)


def save_image(path: Path, image: np.ndarray) -> None:
    """Write an image, RGB or of one channel. Folders are made; JPEG has the quality 95.

    Raises:
        OSError: It could not be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if image.ndim == 3:
        image = image[..., ::-1]
    if not cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 95]):
        raise OSError(f'{path} could not be written')


def _encode_mask(mask: np.ndarray) -> dict:
    """Return COCO's run-length encoding in a form that JSON can hold."""
    from pycocotools import mask as coco_mask

    encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(size=[int(n) for n in encoded['size']], counts=encoded['counts'].decode())


def write_coco(root: Path, split: str, items: Iterable[Labelled], classes: Sequence[str] = SHAPES) -> None:
    """Write ``<split>2017/*.jpg`` and ``annotations/instances_<split>2017.json``.

    Args:
        root: Folder of the data set.
        split: ``'train'``, ``'val'`` or ``'test'``.
        items: The images, with masks and labels.
        classes: Names of the labels. Defaults to ``SHAPES``.
    """
    images: list[dict] = []
    annotations: list[dict] = []
    for number, scene in enumerate(items):
        name = f'{number:012d}.jpg'
        save_image(root / f'{split}2017' / name, scene.image)
        height, width = scene.semantic.shape
        images.append(dict(id=number, file_name=name, height=height, width=width))
        for mask, label in zip(scene.masks, scene.labels):
            rows, columns = np.where(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=label + 1,
                    bbox=[float(n) for n in box],
                    area=float(mask.sum()),
                    iscrowd=0,
                    segmentation=_encode_mask(mask),
                )
            )
    categories = [dict(id=i + 1, name=name, supercategory='object') for i, name in enumerate(classes)]
    path = root / 'annotations' / f'instances_{split}2017.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


_LONG = {'train': 'training', 'val': 'validation', 'test': 'testing'}


def write_ade20k(root: Path, split: str, items: Iterable[Labelled]) -> None:
    """Write ``images`` and ``annotations`` of a split. Label 0 means unlabelled, so classes start at 1."""
    for number, scene in enumerate(items):
        name = f'ADE_{split}_{number:08d}'
        save_image(root / 'images' / _LONG[split] / f'{name}.jpg', scene.image)
        save_image(root / 'annotations' / _LONG[split] / f'{name}.png', scene.semantic + 1)


def write_nyu(root: Path, split: str, items: Iterator[Scene]) -> None:
    """Write ``images/{train,test}/*.jpg`` and ``annotations/{train,test}/*.png``, in 16-bit millimetres."""
    folder = {'train': 'train', 'val': 'test'}[split]
    for number, scene in enumerate(items):
        name = f'study_{number:04d}_{split}'
        save_image(root / 'images' / folder / f'{name}.jpg', scene.image)
        save_image(root / 'annotations' / folder / f'{name}.png', np.round(scene.depth * 1000).astype(np.uint16))


def write_classification(root: Path, split: str, items: Iterator[Scene]) -> None:
    """Write ``<split>/<class>/*.jpg``: a square crop around each object."""
    for number, scene in enumerate(items):
        height, width = scene.depth.shape
        for index, (mask, label) in enumerate(zip(scene.masks, scene.labels)):
            rows, columns = np.where(mask)
            side = min(int(1.3 * max(np.ptp(rows), np.ptp(columns)) + 4), height, width)
            top = int(np.clip(rows.mean() - side / 2, 0, height - side))
            left = int(np.clip(columns.mean() - side / 2, 0, width - side))
            crop = scene.image[top : top + side, left : left + side]
            save_image(root / split / SHAPES[label] / f'{number:06d}_{index}.jpg', crop)


WRITERS: dict[str, Callable[[Path, str, Iterator[Scene]], None]] = {
    'coco': write_coco,
    'ade20k': write_ade20k,
    'nyu': write_nyu,
    'classification': write_classification,
}


# Every part has scenes of its own: seeds never meet.
SEEDS = {
    ('source', 'train'): 0,
    ('source', 'val'): 1,
    ('target', 'train'): 2,
    ('target', 'val'): 3,
    ('mixed', 'train'): 1_000_002,
    ('mixed', 'val'): 1_000_003,
}


def write_scenes(
    out: Path,
    style: str,
    formats: Iterable[str] = tuple(WRITERS),
    train: int = 400,
    val: int = 100,
    size: tuple[int, int] = (96, 128),
    seed: int = 0,
) -> None:
    """Render the data sets of one style, each complete or not there at all.

    Args:
        out: Folder to write; the data sets are ``<style>/<format>`` in it, and replace those that are there.
        style: One of ``STYLES``.
        formats: Keys of ``WRITERS``. Defaults to all.
        train: Training scenes. Defaults to 400.
        val: Validation scenes. Defaults to 100.
        size: Height and width in pixels. Defaults to 96 x 128.
        seed: Other seeds give other scenes. Defaults to 0.
    """
    for name in formats:
        folder = out / style / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            for split, number in (('train', train), ('val', val)):
                items = scenes(number, 4 * seed + SEEDS[style, split], style, size)
                items = iter(track(items, f'{style} {name} {split}', total=number))
                WRITERS[name](Path(temporary) / name, split, items)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(Path(temporary) / name, folder)
