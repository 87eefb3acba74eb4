import cv2
import numpy as np
import pytest

from iconformer_mm.comparison.plots import CurvePanel, TradeoffPanel, plot_curves, plot_tradeoff, smooth

NAMES = [f'method {index}' for index in range(16)]


def read(path):
    picture = cv2.imread(str(path))
    assert picture is not None and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    return picture


def test_sixteen_methods_on_four_tasks(tmp_path):
    points = {name: (1000 * index, 50.0 + index, 1.0) for index, name in enumerate(NAMES)}
    panels = [TradeoffPanel(f'task {index}', points) for index in range(4)]
    plot_tradeoff(panels, NAMES, tmp_path / 'new' / 't.png', reference='method 15')
    picture = read(tmp_path / 'new' / 't.png')
    assert picture.shape[1] > picture.shape[0]  # two rows of two

    curves = {name: [(step, 2.0 / step + index / 10) for step in range(1, 50)] for index, name in enumerate(NAMES)}
    plot_curves([CurvePanel('task', curves)] * 4, NAMES, tmp_path / 'c.png', reference='method 15')
    assert read(tmp_path / 'c.png').shape == picture.shape


@pytest.mark.parametrize('points', [{}, {'method 0': (0, 50.0, 0.0)}, {'method 3': (9, 50.0, 0.0)}])
def test_panels_with_little_in_them(tmp_path, points):
    plot_tradeoff([TradeoffPanel('task', points)], NAMES, tmp_path / 't.png')
    plot_curves([CurvePanel('task', {name: [(1, -0.5)] for name in points})], NAMES, tmp_path / 'c.png')
    read(tmp_path / 't.png')
    read(tmp_path / 'c.png')


def test_smoothing_reaches_as_far_as_there_are_values():
    assert smooth([0, 3, 6, 3, 0]) == [3, 3, 2.4, 3, 3]
    assert smooth([]) == []
