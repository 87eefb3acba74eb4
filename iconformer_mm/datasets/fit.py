"""Checks that data, model and metrics fit together, before time is spent on training (ours).

Some mistakes do not stop a training, but make its result wrong: a head for other classes than the data's, masks whose
foreground is ignored, depth that the head cannot predict. The checks are cheap: they read configs, class names and some
of the labels.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from iconformer_mm.registry import is_type, type_name
from iconformer_mm.tuning.backbones import is_below
from iconformer_mm.tuning.injection import PARTS

from .checks import CheckedPipeline, DataError, describe, innermost

MAPS = 16  # number of label maps to check
MORE_MAPS = 1000  # used if the first ones do not show a second class
DEPTH_MAPS = 128
LABELS = 2000  # number of image labels to check
TOO_DEEP = 0.01  # share of the pixels with known depth
# Heads whose num_classes is not that of the data, by a part of their names and by their types.
OTHER_COUNTS = ('backbone', 'rpn_head', 'semantic_head', 'fusion_head')
OTHER_HEADS = ('STDCHead', 'FusedSemanticHead')
NYU_CROP = (slice(45, 471), slice(41, 601))  # rows and columns of mmseg's 'nyu_crop'


@dataclass(frozen=True)
class Head:
    """A head that predicts classes.

    Attributes:
        name: Name in the model, such as ``roi_head.bbox_head.0``.
        num_classes: Number of classes.
        one_channel: Whether it separates two classes with one sigmoid. Defaults to False.
        ignored: The label that it ignores; None if it ignores none. Defaults to None.
    """

    name: str
    num_classes: int
    one_channel: bool = False
    ignored: int | None = None

    def fits(self, count: int) -> bool:
        """Whether the head fits this number of classes."""
        return self.num_classes == count or (self.one_channel and count == 2)


@dataclass(frozen=True)
class Model:
    """The properties of a model that data must fit.

    Attributes:
        heads: The heads that predict classes.
        max_depth: The largest depth that can be predicted, in metres; None if depth is not bounded.
    """

    heads: tuple[Head, ...] = ()
    max_depth: float | None = None


def look_at_model(model: nn.Module | Mapping[str, Any]) -> Model:
    """Find the heads of a model.

    Args:
        model: A model, or its config. A config shows only what it sets explicitly.
    """
    # Here classes are words of a prompt, or the model predicts tracks.
    if _get(model, 'language_model') is not None or _get(model, 'tracker') is not None:
        return Model()
    if isinstance(model, Mapping) and 'module' in model and 'backbone' not in model:
        model = model['module']  # test-time augmentation
    found, depths = [], []
    for name, part in model.named_modules() if isinstance(model, nn.Module) else _nodes(model):
        if is_below(name, [PARTS]):
            continue  # heads of inactive adapters are for other data
        depth = _get(part, 'max_depth')
        if isinstance(depth, (int, float)) and 'head' in name:
            depths.append(float(depth))
        number = _num_classes(part)
        if number is not None and _counts_classes(name, part):
            loss = _get(part, 'loss_decode')
            losses = loss if isinstance(loss, (list, tuple, nn.ModuleList)) else [loss]
            sigmoid = any(_get(each, 'use_sigmoid') for each in losses)
            ignored = _get(part, 'ignore_index')
            found.append(Head(name, number, number == 1 and sigmoid, ignored if isinstance(ignored, int) else None))
    return Model(tuple(found), min(depths, default=None))


def _get(part: Any, name: str) -> Any:
    return part.get(name) if isinstance(part, Mapping) else getattr(part, name, None)


def _nodes(node: Any, name: str = '') -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield all dictionaries of a config, named like their modules."""
    if isinstance(node, Mapping):
        yield name, node
        children: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, (list, tuple)):
        children = enumerate(node)
    else:
        return
    for key, child in children:
        yield from _nodes(child, f'{name}.{key}'.removeprefix('.'))


def _num_classes(part: Any) -> int | None:
    number = _get(part, 'num_classes')
    if number is None and isinstance(part, Mapping) and 'num_things_classes' in part and 'num_stuff_classes' in part:
        number = part['num_things_classes'] + part['num_stuff_classes']
    return number if isinstance(number, int) and not isinstance(number, bool) and number > 0 else None


def _counts_classes(name: str, part: Any) -> bool:
    """Whether a module is a head for the classes of the data."""
    words = [word for word in name.split('.') if not word.isdigit()]
    if not words or not words[-1].endswith('head') or any(other in word for word in words for other in OTHER_COUNTS):
        return False
    depth = _get(part, 'max_depth') is not None or 'Depth' in type_name(part)
    return not (depth or _get(part, 'class_agnostic') or is_type(part, *OTHER_HEADS))


# Checks of data sets


def find_class_list_fault(dataset: Any) -> str | None:
    """Describe a wrong list of classes in a data set's config, such as a single string; None if all are fine.

    Args:
        dataset: The config. Nested configs are checked, too.
    """
    for _, node in _nodes(dataset):
        for classes in (node.get('classes'), (node.get('metainfo') or {}).get('classes')):
            if classes is None or '://' in str(classes):
                continue
            if isinstance(classes, str):
                if Path(classes).expanduser().is_file():
                    continue  # a file with one name per line
                return (
                    f'the classes of {describe(node)} are the word {classes!r}, whose letters would be taken for '
                    f'classes: a tuple of one name needs a comma, classes=({classes!r},)'
                )
            wrong = [name for name in classes if not isinstance(name, str)]
            if wrong or not classes:
                what = f'hold {wrong[0]!r}, which is not a name' if wrong else 'are an empty list'
                return f'the classes of {describe(node)} {what}: write them as a list of names'
    return None


def classes_of(dataset: Any) -> tuple[str, ...] | None:
    """Return the class names of a data set that is not a wrapper; None if it has none."""
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    return None if classes is None else tuple(classes) if not isinstance(classes, str) else (classes,)


def find_faults(
    model: Model, dataset: Any, metrics: Sequence[Any] = (), training: bool = False, known: Any = None
) -> Iterator[str]:
    """Find everything that does not fit.

    Args:
        model: The model, as returned by :func:`look_at_model`.
        dataset: A data set, checked by :func:`~iconformer_mm.datasets.checks.check_dataset`.
        metrics: The metrics that evaluate it, already built.
        training: Whether it is the training data. Defaults to False.
        known: The training data, if ``dataset`` is another data set. Defaults to None.

    Returns:
        One sentence per fault.

    Raises:
        DataError: A label file that was checked is wrong. The message names it.
    """
    reference = None if known is None else next((c for c in map(classes_of, innermost(known)) if c), None)
    with random_state_kept():
        for part in innermost(dataset):
            classes = classes_of(part)
            if isinstance((getattr(part, 'metainfo', None) or {}).get('classes'), str):
                yield (
                    f'the classes of {describe(part)} are the word {classes[0]!r}, whose letters would be taken for '  # type: ignore[index]
                    f'classes: a tuple of one name needs a comma, classes=({classes[0]!r},)'  # type: ignore[index]
                )
                continue
            if _loads(part, 'Depth'):
                yield from _depth_faults(model, part, metrics, training)
                continue
            if model.heads and reference and classes and reference != classes:
                yield other_classes(part, classes, reference)
            fault = class_fault(model, part, (getattr(part, 'metainfo', None) or {}))
            if fault:
                yield fault
                continue
            yield from _annotation_faults(part, classes)
            yield from _map_faults(model, part, classes)
            yield from _image_label_faults(model, part, classes, training)
    yield from _metric_faults(model, metrics)


def class_fault(model: Model, dataset: Any, metainfo: Mapping[str, Any]) -> str | None:
    """Describe the heads whose number of classes differs from a data set's; None if all fit.

    Args:
        model: The model.
        dataset: The data set, or its config.
        metainfo: The known metadata of the data set, with its classes.
    """
    classes = metainfo.get('classes')
    if not classes or isinstance(classes, str):
        return None
    counts = {len(classes)}
    if 'thing_classes' in metainfo:  # heads for things, for stuff, and for stuff plus one class for all things
        things, stuff = len(metainfo['thing_classes']), len(metainfo.get('stuff_classes') or ())
        counts |= {things, stuff, stuff + 1}
    wrong = [head for head in model.heads if not any(head.fits(count) for count in counts)]
    if not wrong:
        return None
    heads = ', '.join(f'{head.name} is for {head.num_classes}' for head in wrong)
    return (
        f'{heads} classes, but {describe(dataset)} has {len(classes)} ({_some(classes)}): set '
        f'num_classes={len(classes)} in {", ".join(f"model.{head.name}" for head in wrong)}'
    )


def other_classes(dataset: Any, classes: Sequence[str], trained: Sequence[str]) -> str:
    """Describe how the classes of a data set differ from those of the training data."""
    place = next((i for i, pair in enumerate(zip(classes, trained)) if pair[0] != pair[1]), None)
    what = f'{len(classes)} classes' if place is None else f"'{classes[place]}' for class {place}"
    instead = len(trained) if place is None else f"'{trained[place]}'"
    return f'{describe(dataset)} has {what}, but the training data has {instead}: give both the same `classes`'


def is_depth(dataset: Mapping[str, Any]) -> bool:
    """Whether a data set's config loads depth. Its classes do not matter then."""
    return any('Depth' in type_name(transform) for transform in dataset.get('pipeline') or ())


def _some(names: Sequence[str], limit: int = 6) -> str:
    # An ImageNet name is a list of synonyms.
    return ', '.join(str(name).partition(',')[0] for name in names[:limit]) + (', ...' if len(names) > limit else '')


def _loads(part: Any, what: str) -> bool:
    """Whether a data set's pipeline loads a kind of labels."""
    transforms = getattr(getattr(part, 'pipeline', None), 'transforms', ())
    names = [type(transform).__name__ for transform in transforms]
    return any(name.startswith('Load') and 'Annotation' in name and what in name for name in names)


def _spread(number: int, limit: int) -> list[int]:
    """Return at most ``limit`` evenly spaced indices below ``number``, including the first and the last."""
    return sorted({int(i) for i in np.linspace(0, number - 1, min(number, limit)).round()}) if number else []


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random state afterwards, so that looking at data does not change later random numbers."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _maps(part: Any, key: str, indices: Iterable[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the label maps of a data set as loaded, with their files. Samples without a map are skipped."""
    if not isinstance(part.pipeline, CheckedPipeline):
        return
    for index in indices:
        loaded = part.pipeline.load(part.get_data_info(index), key)
        if loaded is not None:
            yield loaded


def _map_faults(model: Model, part: Any, classes: tuple[str, ...] | None) -> Iterator[str]:
    """Find label maps of semantic segmentation that hold only one class and ignored labels."""
    heads = [head for head in model.heads if not head.name.startswith(('bbox_head', 'roi_head'))]
    # Only mmseg's data sets. In other libraries these maps are for one of several heads.
    if not hasattr(part, 'reduce_zero_label') or not _loads(part, '') or not heads:
        return
    number = len(classes) if classes else max(head.num_classes for head in heads)
    ignored = {head.ignored for head in heads if head.ignored is not None} or {255}
    part.pipeline.num_classes, part.pipeline.ignored = number, frozenset(ignored)
    if number < 2:
        return
    held: set[int] = set()
    looked = pixels = left_out = 0
    done: set[int] = set()
    for limit in (MAPS, MORE_MAPS):
        indices = [index for index in _spread(len(part), limit) if index not in done]
        done.update(indices)
        for _, labels in _maps(part, 'gt_seg_map', indices):
            values, counts = np.unique(labels, return_counts=True)
            held.update(int(value) for value in values)
            looked, pixels = looked + 1, pixels + labels.size
            left_out += int(counts[np.isin(values, list(ignored))].sum())
            if len(held - ignored) > 1:
                return
    if looked == 0 or (left_out == 0 and looked == 1):
        return
    only = sorted(held - ignored)
    what = f'class {only[0]}' + (f' ({classes[only[0]]})' if classes else '') if only else 'no class'
    values = ', '.join(map(str, sorted(ignored)))
    yield (
        f'{describe(part)}: the {looked} label maps that were checked hold {what} and, on {left_out / pixels:.0%} of '
        f'their pixels, {values}, which is ignored. Any prediction would score 100 %. The maps must hold the indices '
        f'of the {number} classes after reduce_zero_label; divide masks of 0 and 255 by 255'
    )


def _image_label_faults(model: Model, part: Any, classes: tuple[str, ...] | None, training: bool) -> Iterator[str]:
    """Find image labels outside the classes, and a head with more classes than data without class names."""
    if not hasattr(part, 'get_gt_labels') or not model.heads:
        return
    number = min(head.num_classes for head in model.heads)
    largest, indices = -1, _spread(len(part), LABELS)
    for index in indices:
        info = part.get_data_info(index)
        label = info.get('gt_label')
        labels = np.asarray([] if label is None else label).ravel()
        if not np.issubdtype(labels.dtype, np.integer):
            continue
        wrong = labels[(labels < 0) | (labels >= number)]
        if len(wrong):
            name = info.get('img_path') or f'sample {index}'
            yield (
                f'{describe(part)}: {name} has the label {wrong[0]}, but {model.heads[0].name} is for {number} '
                f'classes, 0 to {number - 1}'
            )
            return
        largest = max(largest, int(labels.max(initial=-1)))
    if training and classes is None and 0 <= largest < number - 1 and len(indices) == len(part):
        yield (
            f'{model.heads[0].name} is for {number} classes, but the largest label of {describe(part)} is {largest}: '
            f'set num_classes={largest + 1} in model.{model.heads[0].name}, or name all classes in `classes` of the '
            'data set'
        )


def _annotation_faults(part: Any, classes: tuple[str, ...] | None) -> Iterator[str]:
    """Find classes that a COCO annotation file does not define. The library drops them silently."""
    known = getattr(part, 'cat_ids', None)
    if classes is None or not hasattr(part, 'cat2label') or not isinstance(known, (list, tuple)):
        return
    if len(known) < len(classes):
        yield (
            f'{describe(part)}: its annotation file knows {len(known)} of the {len(classes)} classes {_some(classes)}; '
            'the others would have no instances. Spell the names as in its `categories`'
        )


def _depth_faults(model: Model, part: Any, metrics: Sequence[Any], training: bool) -> Iterator[str]:
    """Find depth that cannot be predicted or measured."""
    ranges = [] if training else [DepthRange.of(metric) for metric in metrics if is_type(metric, 'DepthMetric')]
    if isinstance(part.pipeline, CheckedPipeline):
        part.pipeline.depth_ranges = ranges
    looked = known = deep = 0
    deepest, where = 0.0, ''
    for name, depth in _maps(part, 'gt_depth_map', _spread(len(part), DEPTH_MAPS)):
        looked += 1
        measured = depth > 0
        for each in ranges:
            measured &= each.mask(depth)
        known += int(measured.sum())
        if model.max_depth is not None:
            beyond = measured & (depth > model.max_depth)
            deep += int(beyond.sum())
            if beyond.any() and depth[beyond].max() > deepest:
                deepest, where = float(depth[beyond].max()), name
    if looked and known == 0:
        yield (
            f'{describe(part)}: the {looked} depth maps that were checked hold only 0, which means unknown: check '
            'the folder and the depth_rescale_factor of LoadDepthAnnotation'
        )
    elif known and deep > TOO_DEEP * known:
        yield (
            f'{describe(part)}: {deep / known:.0%} of the known depth lies beyond {model.max_depth:g} m, the max_depth '
            f'of the head, up to {deepest:g} m in {where}, and cannot be predicted: set max_depth, and max_depth_eval '
            "of the metric, to the data's range, or write 0 where depth should not be learned"
        )


@dataclass(frozen=True)
class DepthRange:
    """The range in which a metric measures depth.

    Attributes:
        lowest: Depth must be larger, in metres.
        highest: Depth must be smaller, in metres.
        crop: Whether only mmseg's crop of NYU-v2 images counts.
    """

    lowest: float
    highest: float
    crop: bool

    @classmethod
    def of(cls, metric: Any) -> DepthRange:
        """Read the range of mmseg's DepthMetric."""
        return cls(float(metric.min_depth_eval), float(metric.max_depth_eval), metric.crop_type == 'nyu_crop')

    def mask(self, depth: np.ndarray) -> np.ndarray:
        """Return a mask of the measured pixels of a map (H, W)."""
        inside = (depth > self.lowest) & (depth < self.highest)
        if self.crop:
            cropped = np.zeros_like(inside)
            cropped[NYU_CROP] = inside[NYU_CROP]
            inside = cropped
        return inside

    def find_fault(self, depth: np.ndarray) -> str | None:
        """Describe a map without measured pixels, which makes every metric NaN; None if it has some."""
        if self.mask(depth).any():
            return None
        where = ' within the NYU crop' if self.crop else ''
        return (
            f'no depth in the map lies between {self.lowest:g} and {self.highest:g} m (min_depth_eval and '
            f'max_depth_eval of the metric){where}, and its largest is {depth.max(initial=0):g} m: all metrics would '
            "be NaN. Leave the image out, or set the range to the data's range"
        )


def _metric_faults(model: Model, metrics: Sequence[Any]) -> Iterator[str]:
    """Find a top-k accuracy that would fail at the first validation."""
    number = min((head.num_classes for head in model.heads), default=None)
    for metric in metrics:
        topk = getattr(metric, 'topk', None)
        if number is not None and isinstance(topk, (list, tuple)) and topk and max(topk) > number:
            yield (
                f'{type_name(metric)} computes the top-{max(topk)} accuracy, but {model.heads[0].name} is for '
                f'{number} classes: set topk={tuple(k for k in topk if k <= number) or (1,)} in the evaluator'
            )


def check_fit(
    model: Model, dataset: Any, metrics: Sequence[Any] = (), training: bool = False, known: Any = None
) -> None:
    """Refuse data that does not fit; see :func:`find_faults`.

    Raises:
        DataError: The data does not fit. The message describes the first fault.
    """
    for fault in find_faults(model, dataset, metrics, training, known):
        raise DataError(fault)
