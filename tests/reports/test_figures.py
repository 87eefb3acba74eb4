import math
import xml.etree.ElementTree as ET

import pytest

from iconformer_mm.reports.figures import HistoryPanel, draw_history


@pytest.mark.parametrize('values', [[3.0, 2.0, 1.0], [1.0], [0.0, -1.0], [math.nan], [1.0, math.inf, 2.0]])
def test_a_panel_is_a_picture_whatever_its_values(values):
    panel = HistoryPanel('loss <total>', 'iteration', {'loss': list(enumerate(values)), 'other': [(0, 1.0)]})
    text = draw_history(panel, logarithmic=True)
    root = ET.fromstring(text.partition('?>')[2].partition('.dtd">')[2])
    assert root.tag.endswith('svg') and float(root.get('width').removesuffix('pt')) > 300
    assert draw_history(panel, logarithmic=True) == text  # no dates, no random names
