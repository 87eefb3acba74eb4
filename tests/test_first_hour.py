"""docs/first_hour.md, adapted to four images: its config, and its commands in their order."""

import json
from pathlib import Path

import cv2
from conftest import ROOT
from run_page import link_checkout, read_blocks, run_bash, run_python

from iconformer_mm.datasets.scenes import WRITERS, scenes

PAGE = ROOT / 'docs' / 'first_hour.md'
SHORT = (
    'train_cfg.max_epochs=1 train_dataloader.dataset.indices=4 default_hooks.logger.interval=1 '
    'train_dataloader.num_workers=0 train_dataloader.persistent_workers=False '
    'val_dataloader.num_workers=0 val_dataloader.persistent_workers=False'
)


def test_the_stock_config(tmp_path, monkeypatch):
    link_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    for split in ('train', 'val'):
        WRITERS['coco'](Path('data/scenes/target/coco'), split, scenes(4, 0, 'target'))
    commands = []
    for block in read_blocks(PAGE):
        if block.kind == 'python':
            run_python(block.code, {}, PAGE.name)  # writes the config
        elif block.kind == 'bash' and ('my_scenes' in block.code or 'work_dirs/first_hour' in block.code):
            commands += block.code.replace('\\\n', ' ').strip().splitlines()
    tools = [command.split()[1] for command in commands]
    assert tools == [f'tools/{name}.py' for name in ('inspect_model', 'train', 'predict', 'report')]

    for command in commands:
        run_bash(f'{command} {SHORT}' if 'tools/train.py' in command else command, PAGE.name)

    run = Path('work_dirs/first_hour')
    predictions = json.loads((run / 'predictions' / 'predictions.json').read_text())
    assert len(predictions['predictions']) == 4 and not predictions['skipped']
    assert cv2.imread(str(next((run / 'predictions').rglob('*.png')))).std() > 0
    report = (run / 'report.html').read_text(encoding='utf-8')
    assert report.count('predictions/') >= 4 and 'coco/segm_mAP' in report
    assert (run / 'adapter.safetensors').stat().st_size < (run / 'epoch_1.pth').stat().st_size / 2
