import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator

from iconformer_mm.comparison.image_scores import ImageScores, observe


def test_scores_of_sets_of_images():
    """Against sums that are written out; a class that no image has does not count."""
    above = np.array([[1.0, 0, 0], [2.0, 3, 0], [0.0, 1, 0]])
    below = np.array([[2.0, 0, 0], [2.0, 4, 0], [1.0, 2, 0]])
    images = ImageScores(above, below)
    assert images.score() == pytest.approx((3 / 5 + 4 / 6) / 2)
    assert images.score(np.array([0, 0])) == pytest.approx(1 / 2)
    sets = np.array([[0, 1, 1], [2, 2, 2]])
    expected = [((1 + 2 + 2) / 6 + 6 / 8) / 2, (0 / 3 + 3 / 6) / 2]
    np.testing.assert_allclose(images.scores(sets), expected)
    assert np.isnan(ImageScores(above[:, 2:], below[:, 2:]).score())


@pytest.mark.parametrize('whole', [True, False])
def test_there_and_back(whole):
    generator = np.random.default_rng(0)
    values = generator.integers(0, 9, (5, 3)).astype(float) if whole else generator.random((5, 1))
    ones = ImageScores(values, np.ones_like(values))
    assert 'denominators' not in ones.to_json()
    for images in (ones, ImageScores(values, values + 1)):
        again = ImageScores.from_json(images.to_json())
        np.testing.assert_allclose(again.numerators, images.numerators, atol=1e-6)
        np.testing.assert_allclose(again.denominators, images.denominators, atol=1e-6)


def evaluate(metric, name, results, meta=None):
    """The score that a metric gives, and what was noted."""
    evaluator = Evaluator(metric)
    evaluator.dataset_meta = meta
    noted = observe(evaluator, name)
    (inner,) = evaluator.metrics
    inner.results = results
    return evaluator.evaluate(len(results))[name], noted


def test_accuracy():
    from mmpretrain.evaluation import Accuracy

    generator = torch.Generator().manual_seed(0)
    results = [
        dict(pred_score=torch.rand(4, generator=generator), gt_label=torch.tensor([index % 4])) for index in range(20)
    ]
    score, (noted,) = evaluate(Accuracy(topk=(1,)), 'accuracy/top1', results)
    assert noted.score() == pytest.approx(score)
    assert noted.numerators.shape == (20, 1) and set(noted.numerators.ravel()) <= {0, 100}


def test_intersection_over_union():
    from mmseg.evaluation import IoUMetric

    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 3, (6, 2, 8, 8), generator=generator)
    results = [IoUMetric.intersect_and_union(one, two, 3, 255) for one, two in maps]
    score, (noted,) = evaluate(IoUMetric(), 'mIoU', results, dict(classes=('a', 'b', 'c')))
    assert noted.score() == pytest.approx(score, abs=0.01)


def test_depth():
    from mmseg.evaluation import DepthMetric

    generator = torch.Generator().manual_seed(0)
    results = [(1 + torch.rand(9, generator=generator), 1 + torch.rand(9, generator=generator)) for _ in range(5)]
    expected = np.mean([float((truth - found).square().mean().sqrt()) for truth, found in results])
    score, (noted,) = evaluate(DepthMetric(), 'rmse', results)
    assert score == pytest.approx(expected, rel=1e-5) and noted.score() == pytest.approx(expected, rel=1e-5)


def test_average_precision_is_no_mean_over_images():
    evaluator = Evaluator([])
    assert observe(evaluator, 'coco/segm_mAP') == []
