"""Adapter checkpoints of two processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT, free_port

from iconformer_mm.checkpoint import load_safetensors

CONFIG = ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'


def train(work_dir, epochs, processes, *arguments):
    options = ['default_hooks.checkpoint.type=AdapterCheckpointHook', 'default_hooks.checkpoint.interval=1']
    options += ['default_hooks.checkpoint.max_keep_ckpts=-1', f'train_cfg.max_epochs={epochs}']
    options += ['train_cfg.val_interval=1', 'train_dataloader.batch_size=25', 'param_scheduler=None']
    command = ['bash', ROOT / 'tools' / 'dist_train.sh', CONFIG, processes]
    if processes == 1:
        command = [sys.executable, ROOT / 'tools' / 'train.py', CONFIG]
    command += ['--work-dir', work_dir, *arguments, '--cfg-options', *options]
    environment = {**os.environ, 'PORT': free_port(), 'OMP_NUM_THREADS': '1'}
    environment['PATH'] = f'{Path(sys.executable).parent}:{environment["PATH"]}'
    result = subprocess.run([str(c) for c in command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return result.stdout + result.stderr


def final(work_dir, epoch):
    return load_safetensors(str(work_dir / f'epoch_{epoch}.safetensors'))['state_dict']


def test_two_processes_write_once_and_go_on_exactly(tmp_path):
    train(tmp_path / 'whole', 3, 2)
    train(tmp_path / 'cut', 2, 2)
    assert len(load_safetensors(str(tmp_path / 'cut' / 'epoch_2.safetensors'))['iconformer_mm']['rank_states']) == 2
    train(tmp_path / 'cut', 3, 2, '--resume')
    first, second = final(tmp_path / 'whole', 3), final(tmp_path / 'cut', 3)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(p.name for p in (tmp_path / 'whole').glob('*.safetensors')) == [
        'adapter.safetensors',
        *(f'epoch_{n}.safetensors' for n in (1, 2, 3)),
    ]
    # Another number of processes goes on, and says what it cannot restore.
    output = train(tmp_path / 'cut', 4, 1, '--resume')
    assert 'written by 2 processes, this run has 1' in output
    assert not torch.equal(final(tmp_path / 'cut', 4)['head.fc.weight'], second['head.fc.weight'])
