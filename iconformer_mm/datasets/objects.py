"""Photographed objects composed over photographs: classification, semantic and instance segmentation (ours).

Objects and backgrounds are split into training, validation and test before anything is composed. So no object and no
background of a test image was seen in training. Everything is drawn from a seed, and no image depends on their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.few_shot import image_files
from iconformer_mm.datasets.scenes import save_image, write_ade20k, write_coco
from iconformer_mm.files import replaced_folder, write_json

SOURCES = 'sources.json'  # what each image shows, its background first
SPLITS = ('train', 'val', 'test')
SHARES = {'train': 0.5, 'val': 0.2, 'test': 0.3}  # of the objects of each category, and of the backgrounds
FORMS = ('classification', 'semantic', 'instance')
BACKGROUND = 'background'  # the first class of the semantic form
SPLIT_SEED = 0  # the split is a property of the data: other images of another seed keep to it

LARGEST_CUTOUT = 512  # pixels, longest side that is kept in memory
LARGEST_BACKGROUND = 800  # pixels, shortest side that is kept in memory
LARGEST_ZOOM = 2.5  # small cut-outs are not enlarged further
_TRIES = 20  # places that are tried for an object before it is left out


@dataclass
class Composition:
    """One composed image.

    Attributes:
        image: (H, W, 3), uint8, RGB.
        semantic: (H, W), uint8. 0 is the background, 1 the first category.
        masks: Visible mask of each object, (H, W), bool.
        labels: Index of each object's category.
        areas: Pixels of each object before others hid a part of it.
        sources: Name of the background, then of each object.
    """

    image: np.ndarray
    semantic: np.ndarray
    masks: list[np.ndarray] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


@dataclass
class Part:
    """The objects and backgrounds of one split.

    Attributes:
        objects: Files by category.
        backgrounds: Files.
    """

    objects: dict[str, list[Path]]
    backgrounds: list[Path]


def split_sources(cutouts: Path, backgrounds: Path) -> dict[str, Part]:
    """Split objects and backgrounds into ``'train'``, ``'val'`` and ``'test'``.

    Files whose names continue one another's, such as ``pig``, ``pig_golden`` and ``pig-2``, may show one object. They
    come into the same split.

    Args:
        cutouts: Folder with one sub-folder per category, of images with alpha.
        backgrounds: Folder of photographs.

    Raises:
        DataError: There are too few categories, objects of one, or backgrounds.
    """
    for folder in (cutouts, backgrounds):
        if not folder.is_dir():
            raise DataError(f'the folder {folder} does not exist')
    categories = sorted(p.name for p in cutouts.iterdir() if p.is_dir() and not p.name.startswith('.'))
    if len(categories) < 2:
        raise DataError(f'{cutouts} has {len(categories)} folders; it needs one for each category, two at least')
    groups = {name: _group(image_files(cutouts / name)) for name in categories}
    few = [f'{name} ({len(found)})' for name, found in groups.items() if len(found) < len(SPLITS)]
    if few:
        raise DataError(
            f'{cutouts}: every category needs {len(SPLITS)} objects at least, one each to train, validate and test; '
            f'too few in {", ".join(few[:5])}. Files whose names continue one another count as one object'
        )
    behind = [[path] for path in image_files(backgrounds)]
    if len(behind) < len(SPLITS):
        raise DataError(
            f'{backgrounds} has {len(behind)} images; {len(SPLITS)} backgrounds at least are needed, one each to '
            'train, validate and test'
        )
    parts = {name: _share(found, name) for name, found in groups.items()}
    scenes = _share(behind, BACKGROUND)
    return {split: Part({name: parts[name][split] for name in categories}, scenes[split]) for split in SPLITS}


def _group(paths: Sequence[Path]) -> list[list[Path]]:
    """Files that may show the same object, by their names."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths, key=lambda p: (len(p.stem), p.name)):
        first = next((name for name in groups if path.stem.startswith((f'{name}_', f'{name}-'))), path.stem)
        groups.setdefault(first, []).append(path)
    return [groups[name] for name in sorted(groups)]


def _share(groups: Sequence[list[Path]], name: str) -> dict[str, list[Path]]:
    """Deal groups out, each time to the split that lacks most of its share. Each split gets one at least."""
    rng = np.random.default_rng([SPLIT_SEED, *name.encode()])
    total = sum(map(len, groups))
    dealt: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for index in rng.permutation(len(groups)):
        empty = [split for split in SPLITS if not dealt[split]]
        split = max(empty or SPLITS, key=lambda split: SHARES[split] - len(dealt[split]) / total)
        dealt[split] += groups[index]
    return {split: sorted(paths) for split, paths in dealt.items()}


def read_cutout(path: Path) -> np.ndarray:
    """Read an image with alpha, cut to its object.

    Returns:
        (H, W, 4), float32 in [0, 1], colours multiplied by alpha. The longest side is 512 pixels at most.

    Raises:
        DataError: It is no image, has no alpha, or nothing or everything in it is opaque.
    """
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise DataError(f'{path} cannot be read as an image')
    if image.ndim != 3 or image.shape[2] != 4:
        raise DataError(f'{path} has no alpha channel, which says what of it is the object')
    full = 255 if image.dtype == np.uint8 else 65535
    pixels = cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA).astype(np.float32) / full
    opaque = pixels[..., 3] >= 0.5
    if not opaque.any() or opaque.all():
        raise DataError(f'{path}: its alpha channel is {"opaque" if opaque.any() else "transparent"} everywhere')
    rows, columns = np.flatnonzero(opaque.any(axis=1)), np.flatnonzero(opaque.any(axis=0))
    pixels = pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    pixels[..., :3] *= pixels[..., 3:]
    return _shrink(pixels, LARGEST_CUTOUT / max(pixels.shape[:2]))


def read_background(path: Path) -> np.ndarray:
    """Read a photograph.

    Returns:
        (H, W, 3), float32 in [0, 1], RGB. The shortest side is 800 pixels at most.

    Raises:
        DataError: It is no image.
    """
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise DataError(f'{path} cannot be read as an image')
    image = _shrink(image, LARGEST_BACKGROUND / min(image.shape[:2]))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32) / 255


def _shrink(image: np.ndarray, scale: float) -> np.ndarray:
    if scale >= 1:
        return image
    height, width = (max(1, round(scale * n)) for n in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def paste(image: np.ndarray, cutout: np.ndarray, top: int, left: int) -> np.ndarray:
    """Put a cut-out over an image, in place: ``colour + (1 - alpha) * image`` (Porter and Duff, 1984, over).

    Args:
        image: (H, W, 3), float32.
        cutout: (h, w, 4), float32, colours multiplied by alpha. What is beyond the image is cut off.
        top: Row of its upper edge; may be negative.
        left: Column of its left edge; may be negative.

    Returns:
        Where the cut-out is, (H, W), bool: alpha of one half at least.
    """
    mask = np.zeros(image.shape[:2], bool)
    bottom, right = min(top + cutout.shape[0], image.shape[0]), min(left + cutout.shape[1], image.shape[1])
    first, start = max(top, 0), max(left, 0)
    if first >= bottom or start >= right:
        return mask
    part = cutout[first - top : bottom - top, start - left : right - left]
    region = image[first:bottom, start:right]
    region[...] = part[..., :3] + (1 - part[..., 3:]) * region
    mask[first:bottom, start:right] = part[..., 3] >= 0.5
    return mask


def _crop(rng: np.random.Generator, background: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A part of a background, of the proportions of a size, mirrored or not."""
    largest = min(whole / side for whole, side in zip(background.shape, size))
    scale = rng.uniform(0.35, 1) * largest
    height, width = (max(1, int(scale * side)) for side in size)
    top, left = int(rng.integers(len(background) - height + 1)), int(rng.integers(background.shape[1] - width + 1))
    part = background[top : top + height, left : left + width]
    part = part[:, ::-1] if rng.random() < 0.5 else part
    kind = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
    return cv2.resize(np.ascontiguousarray(part), size[::-1], interpolation=kind)


def _lit(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Light on a surface: a colour that is brighter on one side, (H, W, 3), float32."""
    height, width = shape
    angle, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.3)
    rows, columns = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    side = 1 + slope * (np.cos(angle) * columns + np.sin(angle) * rows)
    colour = rng.uniform(0.7, 1.15) * rng.uniform(0.92, 1.08, size=3)
    return (side[..., None] * colour).astype(np.float32)


def _posed(rng: np.random.Generator, cutout: np.ndarray, longest: float) -> np.ndarray:
    """A cut-out at a size in pixels, turned by up to 20 degrees, mirrored or not, and lit."""
    scale = min(longest / max(cutout.shape[:2]), LARGEST_ZOOM)
    height, width = (max(2, round(scale * n)) for n in cutout.shape[:2])
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    cutout = cv2.resize(cutout, (width, height), interpolation=kind)
    if rng.random() < 0.5:
        cutout = cutout[:, ::-1]
    angle = rng.uniform(-20, 20)
    turn: np.ndarray = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1)
    cosine, sine = abs(turn[0, 0]), abs(turn[0, 1])
    wide, high = int(np.ceil(height * sine + width * cosine)), int(np.ceil(height * cosine + width * sine))
    turn[:, 2] += (wide - width) / 2, (high - height) / 2
    cutout = cv2.warpAffine(np.ascontiguousarray(cutout), turn, (wide, high), flags=cv2.INTER_LINEAR)
    # Lit colours stay below alpha, which is white in full light.
    lit = np.minimum(cutout[..., :3] * _lit(rng, (high, wide)), cutout[..., 3:])
    return np.concatenate([lit, cutout[..., 3:]], axis=2)


class Composer:
    """Composes the images of one split.

    Args:
        part: Objects and backgrounds of the split.
        size: Height and width of the images in pixels. Defaults to (224, 224).
        seed: Other seeds give other images of the same objects and backgrounds. Defaults to 0.
        split: Name of the split, which has random numbers of its own. Defaults to ``'train'``.

    Raises:
        DataError: A file is no image, or an object has no alpha.
    """

    def __init__(self, part: Part, size: tuple[int, int] = (224, 224), seed: int = 0, split: str = 'train') -> None:
        self.classes = tuple(part.objects)
        self.size = size
        self._key = [seed, SPLITS.index(split)]
        self._objects = [[(path.name, read_cutout(path)) for path in part.objects[name]] for name in self.classes]
        self._backgrounds = [(path.name, read_background(path)) for path in part.backgrounds]

    def _begin(self, *key: int) -> tuple[np.random.Generator, str, np.ndarray]:
        rng = np.random.default_rng([*self._key, *key])
        name, background = self._backgrounds[rng.integers(len(self._backgrounds))]
        image = _crop(rng, background, self.size)
        return rng, name, image * _lit(rng, image.shape[:2])

    def single(self, label: int, index: int) -> Composition:
        """An image of one object, in front of which may be another one of any category, half as large at most.

        Args:
            label: The category.
            index: Number of the image. Objects take turns.
        """
        rng, name, image = self._begin(0, label, index)
        objects = self._objects[label]
        source, cutout = objects[index % len(objects)]
        longest = rng.uniform(0.45, 0.95) * min(self.size)
        posed = _posed(rng, cutout, longest)
        mask = paste(image, posed, *self._place(rng, posed.shape, margin=0.1))
        semantic = np.where(mask, label + 1, 0).astype(np.uint8)
        found = Composition(image, semantic, [mask], [label], [int(mask.sum())], [name, source])
        if rng.random() < 0.5:
            self._add(rng, found, rng.uniform(0.3, 0.5) * longest, least_visible=0.75, most=found.areas[0] // 2)
        return _finish(found)

    def several(self, index: int, most: int = 6) -> Composition:
        """An image of several objects that hide parts of one another, but no more than half of any.

        Args:
            index: Number of the image.
            most: Largest number of objects. One for which there is no place is left out. Defaults to 6.
        """
        rng, name, image = self._begin(1, index)
        found = Composition(image, np.zeros(image.shape[:2], np.uint8), sources=[name])
        for _ in range(rng.integers(1, most + 1)):
            self._add(rng, found, rng.uniform(0.2, 0.6) * min(self.size), least_visible=0.5)
        return _finish(found)

    def _place(self, rng: np.random.Generator, shape: tuple[int, ...], margin: float) -> tuple[int, int]:
        """Where an object begins, as row and column. A share of it may be beyond the image."""
        ends = [(-margin * length, side - (1 - margin) * length) for length, side in zip(shape, self.size)]
        row, column = (int(np.floor(rng.uniform(min(pair), max(pair)))) for pair in ends)
        return row, column

    def _add(
        self,
        rng: np.random.Generator,
        found: Composition,
        longest: float,
        least_visible: float,
        most: float = np.inf,
    ) -> None:
        """Put an object in front, where it leaves enough of the others to be seen; nowhere if there is no place."""
        label = int(rng.integers(len(self.classes)))
        source, cutout = self._objects[label][rng.integers(len(self._objects[label]))]
        posed = _posed(rng, cutout, longest)
        least = max(12, least_visible * (posed[..., 3] >= 0.5).sum())
        for _ in range(_TRIES):
            image = found.image.copy()
            mask = paste(image, posed, *self._place(rng, posed.shape, margin=0.25))
            visible = [other & ~mask for other in found.masks]
            if least <= mask.sum() <= most and all(v.sum() >= least_visible * n for v, n in zip(visible, found.areas)):
                found.image, found.masks = image, [*visible, mask]
                found.labels.append(label)
                found.areas.append(int(mask.sum()))
                found.sources.append(source)
                found.semantic[mask] = label + 1
                return


def _finish(found: Composition) -> Composition:
    found.image = np.clip(np.round(found.image * 255), 0, 255).astype(np.uint8)
    return found


def write_objects(
    out: Path,
    form: str,
    parts: Mapping[str, Part],
    numbers: Mapping[str, int],
    size: tuple[int, int] = (224, 224),
    seed: int = 0,
) -> None:
    """Write one form of the composed objects. It is complete or not there at all, and replaces one that is there.

    Args:
        out: The folder. The form ``'classification'`` has one folder per split and class, ``'semantic'`` ADE20K's
            format and the file ``classes.txt``, ``'instance'`` COCO's. ``sources.json`` names what each image shows.
        form: One of ``FORMS``.
        parts: Objects and backgrounds by split, from :func:`split_sources`.
        numbers: Images by split; in the form ``'classification'`` of each class.
        size: Height and width of the images in pixels. Defaults to (224, 224).
        seed: Other seeds give other images. Defaults to 0.

    Raises:
        DataError: A file is no image, or an object has no alpha.
        ValueError: The form is unknown, a number is below 1, or the size below 64.
    """
    if form not in FORMS:
        raise ValueError(f'form must be one of {", ".join(FORMS)}, got {form!r}')
    if min(size) < 64 or min(numbers.values()) < 1:
        raise ValueError(f'at least 64 pixels a side and one image a split are needed, got {size} and {dict(numbers)}')
    with replaced_folder(out) as folder:
        sources: dict[str, list[list[str]]] = {}
        for split, number in numbers.items():
            composer = Composer(parts[split], size, seed, split)
            if form == 'classification':
                _write_classes(folder, split, composer, number, sources)
                continue
            sources[split] = []
            items = _noted((composer.several(i) for i in range(number)), sources[split])
            items = iter(track(items, f'{form} {split}', total=number))
            if form == 'semantic':
                write_ade20k(folder, split, items)
                (folder / 'classes.txt').write_text('\n'.join((BACKGROUND, *composer.classes)) + '\n')
            else:
                write_coco(folder, split, items, composer.classes)
        write_json(folder / SOURCES, sources)


def _write_classes(
    folder: Path, split: str, composer: Composer, number: int, sources: dict[str, list[list[str]]]
) -> None:
    images = [(label, index) for label in range(len(composer.classes)) for index in range(number)]
    for label, index in track(images, f'classification {split}'):
        found = composer.single(label, index)
        name = composer.classes[label]
        sources.setdefault(f'{split}/{name}', []).append(found.sources)
        save_image(folder / split / name / f'{index:05}.jpg', found.image)


def _noted(items: Iterator[Composition], sources: list[list[str]]) -> Iterator[Composition]:
    """Note what each image is made of, while it is written."""
    for item in items:
        sources.append(item.sources)
        yield item
