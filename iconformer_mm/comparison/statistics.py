"""Intervals and ranks of a comparison: bootstrap over seeds and test images, and Nemenyi's critical difference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .image_scores import ImageScores

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval.

    Attributes:
        mean: The estimate.
        low: The 2.5 % quantile of the resampled estimates.
        high: The 97.5 % quantile.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class SeedScores:
    """The runs of one method on one task.

    Attributes:
        scores: By seed, the score.
        images: By seed, what each test image adds to it; empty where the score is no mean over images.
    """

    scores: Mapping[int, float]
    images: Mapping[int, ImageScores]


def resample(runs: SeedScores, seeds: np.ndarray, images: np.ndarray | None) -> np.ndarray:
    """Mean scores of resampled seeds and images.

    Args:
        runs: The runs.
        seeds: Seeds that were drawn (resamples, count).
        images: Images that were drawn (resamples, images); None to resample seeds only.

    Returns:
        (resamples,).
    """
    known = sorted(runs.scores)
    if images is None:
        table = np.array([[runs.scores[seed]] * len(seeds) for seed in known])
    else:
        table = np.stack([runs.images[seed].scores(images) for seed in known])
    place = np.searchsorted(known, seeds)
    return table[place, np.arange(len(seeds))[:, None]].mean(axis=1)


def _draws(groups: Sequence[SeedScores], resamples: int) -> tuple[list[int], np.ndarray, np.ndarray | None]:
    """Seeds that all have, and what is drawn of them and of the images: the same for all."""
    generator = np.random.default_rng(0)
    common = sorted(set.intersection(*(set(group.scores) for group in groups)))
    seeds = generator.choice(np.array(common), size=(resamples, len(common))) if common else np.zeros((resamples, 0))
    sizes = {len(group.images[seed].numerators) if seed in group.images else 0 for group in groups for seed in common}
    if len(sizes) != 1 or sizes == {0}:
        return common, seeds, None
    count = sizes.pop()
    return common, seeds, generator.integers(count, size=(resamples, count))


def interval(runs: SeedScores, resamples: int = RESAMPLES) -> Interval | None:
    """The mean score with its interval: a percentile bootstrap over seeds and test images.

    Args:
        runs: The runs of one method.
        resamples: How many. Defaults to 2,000.

    Returns:
        None of fewer than two seeds without scores of images: nothing varies then.
    """
    common, seeds, images = _draws([runs], resamples)
    if not common or (len(common) < 2 and images is None):
        return None
    low, high = np.quantile(resample(runs, seeds, images), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(np.mean([runs.scores[seed] for seed in common])), float(low), float(high))


def paired_difference(first: SeedScores, second: SeedScores, resamples: int = RESAMPLES) -> Interval | None:
    """How much the first scores above the second, on the same seeds and the same test images.

    Args:
        first: The runs of one method.
        second: Those of another, of the same task.
        resamples: How many. Defaults to 2,000.

    Returns:
        None where they share no seed, or where nothing varies.
    """
    common, seeds, images = _draws([first, second], resamples)
    if not common or (len(common) < 2 and images is None):
        return None
    differences = resample(first, seeds, images) - resample(second, seeds, images)
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = np.mean([first.scores[seed] - second.scores[seed] for seed in common])
    return Interval(float(mean), float(low), float(high))


def ranks_of(keys: Sequence[float]) -> list[float]:
    """Rank keys, 1 for the smallest; equal ones share the mean of theirs.

    Args:
        keys: The keys; infinite ones are allowed.
    """
    return [sum(other < key for other in keys) + (keys.count(key) + 1) / 2 for key in keys]


def critical_difference(methods: int, tasks: int) -> float:
    """How far two average ranks lie apart at least where methods differ (Nemenyi; Demsar, JMLR 2006, section 3.2.2).

    Args:
        methods: Number of compared methods, from 2 on.
        tasks: Number of tasks on which all were ranked.

    Returns:
        The difference at a level of 5 %.

    Raises:
        ValueError: There are fewer than two methods, or no tasks.
    """
    if methods < 2 or tasks < 1:
        raise ValueError(f'ranks need two methods and a task at least, got {methods} and {tasks}')
    from scipy.stats import studentized_range

    quantile = studentized_range.ppf(LEVEL, methods, math.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(methods * (methods + 1) / (6 * tasks)))


def cliques(ranks: Mapping[str, float], difference: float) -> list[tuple[str, ...]]:
    """The largest groups of methods whose average ranks lie less than a difference apart.

    Args:
        ranks: Average ranks.
        difference: The critical difference.

    Returns:
        Groups of two methods or more, the best first; none lies within another.
    """
    order = sorted(ranks, key=lambda name: ranks[name])
    found: list[tuple[str, ...]] = []
    for start, name in enumerate(order):
        group = tuple(other for other in order[start:] if ranks[other] - ranks[name] < difference)
        if len(group) > 1 and not any(set(group) <= set(other) for other in found):
            found.append(group)
    return found
