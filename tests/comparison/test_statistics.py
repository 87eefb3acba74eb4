import itertools

import numpy as np
import pytest

from iconformer_mm.comparison.image_scores import ImageScores
from iconformer_mm.comparison.statistics import (
    SeedScores,
    cliques,
    critical_difference,
    interval,
    paired_difference,
)


def runs(table):
    """Runs of the seeds 0, 1, ..., each with scores of images."""
    images = {seed: ImageScores(np.array(row)[:, None], np.ones((len(row), 1))) for seed, row in enumerate(table)}
    return SeedScores({seed: float(np.mean(row)) for seed, row in enumerate(table)}, images)


def test_an_interval_over_seeds_is_that_of_all_resamples():
    """Three seeds have 27 resamples: their quantiles, one by one."""
    scores = dict(enumerate([1.0, 2.0, 6.0]))
    found = interval(SeedScores(scores, {}), resamples=20_000)
    means = [np.mean(each) for each in itertools.product(scores.values(), repeat=3)]
    assert found.mean == 3.0
    np.testing.assert_allclose([found.low, found.high], np.quantile(means, [0.025, 0.975], method='inverted_cdf'))


def test_an_interval_over_images_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(50, 10, 400)
    found = interval(runs([values]))
    error = 1.96 * values.std() / 20
    np.testing.assert_allclose([found.low, found.high], [values.mean() - error, values.mean() + error], atol=0.15)


def test_what_methods_share_cancels_in_paired_differences():
    """Images of very different difficulty, of which one method gets each 1 point more."""
    hard = np.random.default_rng(2).normal(50, 30, (3, 200))
    found = paired_difference(runs(hard + 1), runs(hard))
    np.testing.assert_allclose([found.mean, found.low, found.high], 1.0)
    assert found.excludes_zero
    alone = interval(runs(hard))
    assert alone.high - alone.low > 3


def test_only_common_seeds_are_paired():
    first = SeedScores({0: 1.0, 1: 2.0, 2: 9.0}, {})
    second = SeedScores({0: 0.0, 1: 1.0, 5: 7.0}, {})
    found = paired_difference(first, second)
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    assert paired_difference(SeedScores({0: 1.0}, {}), SeedScores({1: 1.0}, {})) is None
    assert interval(SeedScores({0: 1.0}, {})) is None  # nothing varies


def test_critical_difference():
    """The example of Demsar (JMLR 2006, section 3.2.2): 4 classifiers on 14 data sets."""
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    with pytest.raises(ValueError, match='two methods and a task at least, got 1 and 3'):
        critical_difference(1, 3)


def test_cliques():
    ranks = dict(d=4.0, a=1.0, b=1.5, c=2.1, e=4.2)
    assert cliques(ranks, 1.0) == [('a', 'b'), ('b', 'c'), ('d', 'e')]
    assert cliques(ranks, 2.5) == [('a', 'b', 'c'), ('c', 'd', 'e')]
    assert cliques(ranks, 0.1) == []
