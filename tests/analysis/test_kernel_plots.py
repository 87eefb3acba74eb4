"""Pictures are written, and show what they are given."""

import cv2
import numpy as np
import pytest

from iconformer_mm.analysis.kernel_plots import (
    FilteredMaps,
    SaliencyRow,
    plot_components,
    plot_distances,
    plot_filtered_maps,
    plot_kernels,
    plot_saliency,
    plot_shares,
    spread_out,
)

RNG = np.random.default_rng(0)


def photos(number, size=(24, 32)):
    return [RNG.integers(0, 255, (*size, 3), dtype=np.uint8) for _ in range(number)]


def colours(path):
    """How many pixels of a picture have which colour, in OpenCV's order; a blank one has one."""
    picture = cv2.imread(str(path))
    assert picture is not None and min(picture.shape[:2]) > 80
    found, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    return {tuple(colour.tolist()): count for colour, count in zip(found, counts)}


LOW, HIGH = (84, 1, 68), (36, 231, 253)  # the ends of viridis


def test_indices_are_spread_out():
    assert spread_out(10, 3) == [0, 4, 9] and spread_out(2, 8) == [0, 1] and spread_out(1, 8) == [0]
    assert spread_out(16, 8) == [0, 2, 4, 6, 9, 11, 13, 15]


def test_kernels(tmp_path):
    kernels = np.zeros((2, 3, 3, 3))
    kernels[0, 0, 1, 1], kernels[1, 2, 1, 1] = 1, -1
    plot_kernels(kernels, photos(2), ['a', 'b'], tmp_path / 'new' / 'k.png', 'layer', channels=3)
    found = colours(tmp_path / 'new' / 'k.png')
    assert found[31, 0, 103] > 200 and found[97, 48, 5] > 200  # the tap of 1 in dark red, that of -1 in dark blue
    plot_kernels(np.ones((1, 1, 1, 1)), photos(1, (28, 20)), ['a'], tmp_path / 'one.png', 'one kernel of one tap')
    assert len(colours(tmp_path / 'one.png')) > 50


@pytest.mark.parametrize('layers', [1, 6])
def test_distances(layers, tmp_path):
    matrix = np.array([[0.0, 1.0], [1.0, 0.0]])
    plot_distances({f'layer {i}': matrix * i for i in range(layers)}, tmp_path / 'd.png')
    found = colours(tmp_path / 'd.png')
    assert found[LOW] > 2000
    assert (found.get(HIGH, 0) > 2000) == (layers > 1)  # more of it than in the bar


@pytest.mark.parametrize('number', [2, 30, 70])
def test_components(number, tmp_path):
    points = RNG.normal(size=(number, 2))
    plot_components(points, [0.7, 0.2], photos(number), tmp_path / 'c.png', 'title')
    found = len(colours(tmp_path / 'c.png'))
    assert found > 1000 if number <= 60 else 10 < found < 1000  # thumbnails, or points


def test_shares(tmp_path):
    plot_shares({'first': 0.3, 'second': 0.001}, tmp_path / 's.png')
    plot_shares({'first': 0.0}, tmp_path / 'zero.png')
    blue = (180, 119, 31)
    assert blue in colours(tmp_path / 's.png') and blue not in colours(tmp_path / 'zero.png')


def test_filtered_maps(tmp_path):
    rows = [
        FilteredMaps('first', RNG.normal(size=(6, 8, 5)), RNG.normal(size=(6, 8, 5))),
        FilteredMaps('second', np.zeros((3, 4, 5)), RNG.normal(size=(3, 4, 5))),
    ]
    plot_filtered_maps(rows, photos(1)[0], tmp_path / 'f.png', channels=2)
    found = colours(tmp_path / 'f.png')
    assert found[LOW] > 100 and found[HIGH] > 100  # each map in its own range


def test_saliency(tmp_path):
    grey = [np.full((24, 32, 3), 100, np.uint8), np.full((40, 20, 3), 100, np.uint8)]
    spot = np.zeros((3, 4), np.float32)
    spot[1, 1] = 1
    rows = [SaliencyRow('a', grey[0], [spot, None]), SaliencyRow('b', grey[1], [np.zeros((5, 2), np.float32), spot])]
    plot_saliency(rows, ['Grad-CAM', 'attention'], tmp_path / 's.png')
    picture = cv2.imread(str(tmp_path / 's.png')).astype(int)
    bright = (picture[..., 2] > 150) & (picture[..., 0] < 140)  # the bright end of inferno over grey
    assert bright.sum() > 100
    assert (picture == (42, 40, 40)).all(axis=2).sum() > 100  # 0.4 of the grey and 0.6 of its dark end
