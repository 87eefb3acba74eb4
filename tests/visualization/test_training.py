import math
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest

from iconformer_mm.analysis.lr_range_test import LRRangeTest, plot_lr_range_test
from iconformer_mm.visualization.training import HistoryPanel, draw_history


@pytest.mark.parametrize('values', [[3.0, 2.0, 1.0], [1.0], [0.0, -1.0], [math.nan], [1.0, math.inf, 2.0]])
def test_a_panel_is_a_picture_whatever_its_values(values):
    panel = HistoryPanel('loss <total>', 'iteration', {'loss': list(enumerate(values)), 'other': [(0, 1.0)]})
    text = draw_history(panel, logarithmic=True)
    root = ET.fromstring(text.partition('?>')[2].partition('.dtd">')[2])
    assert root.tag.endswith('svg') and float(root.get('width').removesuffix('pt')) > 300
    assert draw_history(panel, logarithmic=True) == text  # no dates, no random names


@pytest.mark.parametrize('losses', [[2.0] * 5 + [1.0, 0.5, 0.2, 0.1, 0.3, 9.0], [1.0] * 3, [math.nan] * 12])
def test_a_range_test_is_plotted(tmp_path, losses):
    test = LRRangeTest()
    for index, loss in enumerate(losses):
        test.add(1e-4 * 2**index, loss)
    plot_lr_range_test(test, tmp_path / 'p.png')
    assert len(np.unique(cv2.imread(str(tmp_path / 'p.png')).reshape(-1, 3), axis=0)) > 50
