import json

import cv2
import numpy as np
from commands import tool

CONFIG = 'configs/quickstart/vit-quickstart_full_digits.py'


def test_a_rate_for_the_quickstart(tmp_path):
    """It lands between the rates of the comparison's search that train: 0.001 to 0.03."""
    output = tool('find_lr.py', CONFIG, '--peft', 'icon', '--iters', 40, '--min-lr', 1e-5, '--work-dir', tmp_path)
    content = json.loads((tmp_path / 'find_lr.json').read_text())
    assert content['method'] == dict(type='icon') and content['optimizer']['lr'] == 3e-3
    assert len(content['rates']) == len(content['losses']) == len(content['smoothed'])
    assert abs(content['losses'][0] - np.log(10)) < 0.5  # ten classes, nothing learned yet
    for name, rate in content['suggestions'].items():
        assert 3e-4 < rate < 0.1
        assert name in output and f'{rate:.2g}' in output
    assert len(content['suggestions']) == 2
    picture = cv2.imread(str(tmp_path / 'find_lr.png'))
    assert picture is not None and len(np.unique(picture.reshape(-1, 3), axis=0)) > 100
    assert not list(tmp_path.rglob('*.pth')) and not list(tmp_path.rglob('*.safetensors'))


def test_mistakes(tmp_path):
    output = tool('find_lr.py', CONFIG, '--min-lr', 1, '--work-dir', tmp_path, ok=False)
    assert 'error: the learning rates must be positive and rise, got 1 to 1' in output
    assert 'Traceback' not in output
