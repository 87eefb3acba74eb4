"""Scores image by image, from which intervals over test images are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ImageScores:
    """What each test image adds to a score.

    The score of a set of images is the mean over classes of sums of ``numerators`` by sums of ``denominators``. An
    accuracy has one class, and a mean over images has denominators of 1.

    Attributes:
        numerators: (images, classes).
        denominators: (images, classes).
    """

    numerators: np.ndarray
    denominators: np.ndarray

    def score(self, images: np.ndarray | None = None) -> float:
        """The score of some images; a class that none of them has does not count.

        Args:
            images: Indices, or rows of indices (..., count). Defaults to None: all images once.

        Returns:
            The score; NaN where no class is left.
        """
        return float(self.scores(np.arange(len(self.numerators)) if images is None else images))

    def scores(self, images: np.ndarray) -> np.ndarray:
        """The scores of several sets of images.

        Args:
            images: Indices (sets, count).

        Returns:
            (sets,).
        """
        counts = np.apply_along_axis(np.bincount, -1, images, minlength=len(self.numerators)).astype(float)
        above, below = counts @ self.numerators, counts @ self.denominators
        with np.errstate(invalid='ignore', divide='ignore'):
            ratios = np.where(below > 0, above / below, np.nan)
        known = np.isfinite(ratios)
        total = np.where(known, ratios, 0).sum(-1)
        return np.where(known.any(-1), total / np.maximum(known.sum(-1), 1), np.nan)

    def sum_up_to(self, score: float) -> bool:
        """Whether all images once give a score. MMSegmentation rounds to two digits."""
        return abs(self.score() - score) <= 0.01 + 1e-4 * abs(score)

    def to_json(self) -> dict[str, list]:
        """Short lists; denominators that are all 1 are left out."""
        content = dict(numerators=_short(self.numerators))
        if not (self.denominators == 1).all():
            content['denominators'] = _short(self.denominators)
        return content

    @classmethod
    def from_json(cls, content: dict[str, list]) -> ImageScores:
        """Read what :meth:`to_json` wrote."""
        numerators = _wide(content['numerators'])
        denominators = _wide(content['denominators']) if 'denominators' in content else np.ones_like(numerators)
        return cls(numerators, denominators)


def _short(values: np.ndarray) -> list:
    whole = values.astype(np.int64) if (values == values.round()).all() else values.round(6)
    return (whole[:, 0] if whole.shape[1] == 1 else whole).tolist()


def _wide(values: list) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    return array[:, None] if array.ndim == 1 else array


def _accuracy(results: list[dict], metric: Any) -> ImageScores:
    """MMPretrain's ``Accuracy``, ``accuracy/top1``, in percent."""
    right = [float(_predicted(each) == int(each['gt_label'])) for each in results]
    return _means(100 * np.array(right))


def _predicted(result: dict) -> int:
    return int(result['pred_score'].argmax()) if 'pred_score' in result else int(result['pred_label'])


def _iou(results: list[tuple], metric: Any) -> ImageScores:
    """MMSegmentation's ``IoUMetric``, ``mIoU``, in percent."""
    intersections, unions = (np.stack([each[place].cpu().numpy() for each in results]) for place in (0, 1))
    return ImageScores(100 * intersections.astype(float), unions.astype(float))


def _rmse(results: list[tuple], metric: Any) -> ImageScores:
    """MMSegmentation's ``DepthMetric``, ``rmse``, in metres: the mean over images of each image's."""
    return _means(np.array([float(metric._calc_all_metrics(*each)['rmse']) for each in results]))


def _means(values: np.ndarray) -> ImageScores:
    return ImageScores(values[:, None].astype(float), np.ones((len(values), 1)))


# By the name of the score. The average precision of instances is no mean over images: it has no entry.
_READERS: dict[str, Callable[[list, Any], ImageScores]] = {
    'accuracy/top1': _accuracy,
    'mIoU': _iou,
    'rmse': _rmse,
}


def observe(evaluator: Any, name: str) -> list[ImageScores]:
    """Note what each image adds to a score, whenever the score is computed.

    Args:
        evaluator: MMEngine's evaluator.
        name: Name of the score.

    Returns:
        A list that gets one entry for each validation; it stays empty for scores that are no means over images, such
        as an average precision.
    """
    noted: list[ImageScores] = []
    read = _READERS.get(name)
    if read is None:
        return noted
    for metric in evaluator.metrics:
        prefix = f'{metric.prefix}/' if metric.prefix else ''
        if not name.startswith(prefix):
            continue
        compute = metric.compute_metrics

        def compute_and_note(results: list, compute: Any = compute, metric: Any = metric) -> dict[str, float]:
            values = compute(results)
            if name.rpartition('/')[2] in values:
                noted.append(read(results, metric))
            return values

        metric.compute_metrics = compute_and_note
    return noted
