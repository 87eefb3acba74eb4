"""docs/first_hour.md, adapted to four images: its config, and its commands in their order."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from conftest import ROOT
from run_page import BLOCK, FILE, LINKED
from test_scene_configs import WRITERS, scenes

PAGE = ROOT / 'docs' / 'first_hour.md'
SHORT = (
    'train_cfg.max_epochs=1 train_dataloader.dataset.indices=4 default_hooks.logger.interval=1 '
    'train_dataloader.num_workers=0 train_dataloader.persistent_workers=False '
    'val_dataloader.num_workers=0 val_dataloader.persistent_workers=False'
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with what a checkout has, the page's config, and four scenes of a split."""
    root = tmp_path_factory.mktemp('first_hour')
    for name in LINKED:
        (root / name).symlink_to(ROOT / name)
    for split in ('train', 'val'):
        WRITERS['coco'](root / 'data' / 'scenes' / 'target' / 'coco', split, scenes(4, 0, 'target'))
    return root


def test_the_stock_config(folder):
    env = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}', 'OMP_NUM_THREADS': '2'}
    commands = []
    for block in BLOCK.finditer(PAGE.read_text(encoding='utf-8')):
        code = block['code']
        if block['kind'] == 'python':
            (folder / FILE.match(code)[1]).write_text(code, encoding='utf-8')
        elif block['kind'] == 'bash' and ('my_scenes' in code or 'work_dirs/first_hour' in code):
            commands += code.replace('\\\n', ' ').strip().splitlines()
    tools = [command.split()[1] for command in commands]
    assert tools == [f'tools/{name}.py' for name in ('inspect_model', 'train', 'predict', 'report')]

    for command in commands:
        if 'tools/train.py' in command:
            command = f'{command} {SHORT}'
        result = subprocess.run(['bash', '-c', command], cwd=folder, env=env, capture_output=True, text=True)
        assert result.returncode == 0, f'{command}\n{result.stdout[-3000:]}{result.stderr[-3000:]}'

    run = folder / 'work_dirs' / 'first_hour'
    predictions = json.loads((run / 'predictions' / 'predictions.json').read_text())
    assert len(predictions['predictions']) == 4 and not predictions['skipped']
    assert cv2.imread(str(next((run / 'predictions').rglob('*.png')))).std() > 0
    report = (run / 'report.html').read_text(encoding='utf-8')
    assert report.count('predictions/') >= 4 and 'coco/segm_mAP' in report
    assert (run / 'adapter.safetensors').stat().st_size < (run / 'epoch_1.pth').stat().st_size / 2
