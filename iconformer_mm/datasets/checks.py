"""Checks of data whose errors name the file (ours).

Many errors of the mm libraries' loaders do not name the file (a truncated
annotation file, a label without a class). On an empty data set the loaders wait
forever. The checks here are cheap: nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import Compose

from iconformer_mm.registry import type_name

IGNORED_LABEL = 255
# Largest depths, in metres, outside which the unit must be wrong.
PLAUSIBLE_DEPTH = (0.1, 1000.0)
FILE_KEYS = ('img_path', 'seg_map_path', 'depth_map_path')
SOURCE_KEYS = ('data_root', 'ann_file', 'data_prefix', 'split', 'indices')


class DataError(ValueError):
    """The data is wrong, not the program."""


def describe(dataset: Any) -> str:
    """Describe a data set by its class and its source.

    Args:
        dataset: A data set, or its config.
    """
    read: Callable[[str], Any]
    if isinstance(dataset, dict):
        kind, read = type_name(dataset), dataset.get
    else:
        kind, read = type(dataset).__name__, lambda key: getattr(dataset, key, None)
    inner = read('dataset') if read('dataset') is not None else read('datasets')
    if inner is not None:
        inner = inner if isinstance(inner, (list, tuple)) else [inner]
        return f'{kind} of {", ".join(describe(part) for part in inner)}'
    sources = [f'{key}={read(key)!r}' for key in SOURCE_KEYS if read(key)]
    return f'{kind}({", ".join(sources)})'


class CheckedPipeline(Compose):
    """A pipeline whose errors name the files. It checks labels when they are loaded.

    - A label map must have one channel and the image's size. It may hold only
      the labels of the classes and the ignored labels.
    - A depth map must have one channel, the image's size, and plausible values
      in metres.

    Attributes:
        ignored: Ignored labels; 255 unless a head ignores another one.
        depth_ranges: The ranges in which metrics measure depth, see
            :class:`iconformer_mm.datasets.fit.DepthRange`.

    Args:
        pipeline: The data set's pipeline. The list of transforms is shared, so
            hooks that change it also change this pipeline.
        num_classes: Number of classes of the data set, if it has any.
    """

    def __init__(self, pipeline: Compose, num_classes: int | None) -> None:
        self.transforms = pipeline.transforms
        self.num_classes = num_classes
        self.ignored = frozenset({IGNORED_LABEL})
        self.depth_ranges: Sequence[Any] = ()

    def __call__(self, data: dict) -> dict | None:
        """Apply the transforms.

        Raises:
            DataError: A transform failed or a label is wrong. The message names
                the files of the sample.
        """
        return self._run(data)

    def load(self, data: dict, key: str) -> tuple[str, np.ndarray] | None:
        """Apply the transforms until a label map is loaded.

        Args:
            data: The data set's information about a sample.
            key: ``'gt_seg_map'`` or ``'gt_depth_map'``.

        Returns:
            The sample's files and the map; None if the sample has no map.

        Raises:
            DataError: A transform failed or a label is wrong.
        """
        name = _name_of(data)
        loaded = self._run(data, key)
        return None if loaded is None or key not in loaded else (name, loaded[key])

    def _run(self, data: dict, until: str | None = None) -> dict | None:
        name = _name_of(data)
        checks: dict[str, Callable[[np.ndarray, tuple[int, int]], str | None]] = {
            'gt_seg_map': self._find_label_fault,
            'gt_depth_map': self._find_depth_fault,
        }
        for transform in self.transforms:
            try:
                data = transform(data)
            except Exception as error:
                kind = type(transform).__name__
                raise DataError(f'{name}: {kind} failed with {type(error).__name__}: {error}') from error
            if data is None:
                return None
            for key in [key for key in checks if key in data]:
                check = checks.pop(key)  # once, before later transforms change it
                fault = check(data[key], tuple(data.get('ori_shape', data[key].shape))[:2])
                if fault:
                    raise DataError(f'{name}: {fault}')
            if until is not None and until in data:
                break
        return data

    @staticmethod
    def _find_shape_fault(array: np.ndarray, size: tuple[int, int], what: str) -> str | None:
        if array.ndim != 2:
            return f'the {what} must have one channel, but its shape is {array.shape}'
        if array.shape != size:
            return f'the {what} is {array.shape[0]} x {array.shape[1]}, but the image is {size[0]} x {size[1]}'
        return None

    def _find_label_fault(self, labels: np.ndarray, size: tuple[int, int]) -> str | None:
        fault = self._find_shape_fault(labels, size, 'label map')
        if fault or self.num_classes is None:
            return fault
        values = np.unique(labels)
        wrong = values[((values < 0) | (values >= self.num_classes)) & ~np.isin(values, list(self.ignored))]
        if len(wrong) == 0:
            return None
        ignored = ' or '.join(map(str, sorted(self.ignored)))
        return (
            f'the label map holds {", ".join(map(str, wrong[:5]))}, but the data set has {self.num_classes} classes, '
            f'0 to {self.num_classes - 1}, and {ignored} for ignored pixels (counted after reduce_zero_label)'
        )

    def _find_depth_fault(self, depth: np.ndarray, size: tuple[int, int]) -> str | None:
        fault = self._find_shape_fault(depth, size, 'depth map')
        if fault:
            return fault
        if not np.isfinite(depth).all() or depth.min() < 0:
            return 'the depth map holds values that are negative or not finite'
        deepest = depth.max()
        lowest, highest = PLAUSIBLE_DEPTH
        if deepest == 0 or lowest <= deepest <= highest:  # 0 means that no depth is known
            return next(filter(None, (each.find_fault(depth) for each in self.depth_ranges)), None)
        return (
            f'the largest depth is {deepest:g} after scaling, which cannot be metres: set depth_rescale_factor of '
            'LoadDepthAnnotation to the metres of one unit in the file (1e-3 for millimetres)'
        )


def _name_of(data: dict) -> str:
    """Name the files of a sample."""
    files = [str(data[key]) for key in FILE_KEYS if data.get(key)]
    return ', '.join(files) or f'sample {data.get("sample_idx", "without a file")}'


def innermost(dataset: Any) -> Iterator[Any]:
    """Yield the data sets inside wrappers such as ConcatDataset and RepeatDataset."""
    inner = getattr(dataset, 'dataset', getattr(dataset, 'datasets', None))
    if inner is None:
        yield dataset
        return
    for part in inner if isinstance(inner, (list, tuple)) else [inner]:
        yield from innermost(part)


def empty_error(dataset: Any) -> DataError:
    """Create the error for a data set, or its config, that has no samples."""
    return DataError(
        f'{describe(dataset)} has no samples: its annotation file lists none, none of its classes occurs, or its '
        'filter leaves none'
    )


def check_dataset(dataset: Any) -> None:
    """Refuse an empty data set. Make the pipelines of all others name files in their errors.

    Raises:
        DataError: The data set has no samples.
    """
    if len(dataset) == 0:
        raise empty_error(dataset)
    for part in innermost(dataset):
        pipeline = getattr(part, 'pipeline', None)
        if isinstance(pipeline, Compose) and not isinstance(pipeline, CheckedPipeline):
            classes = (getattr(part, 'metainfo', None) or {}).get('classes')
            part.pipeline = CheckedPipeline(pipeline, len(classes) if classes else None)
