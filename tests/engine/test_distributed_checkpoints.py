"""Adapter checkpoints of two processes."""

import torch
from commands import ranks, tool
from conftest import ROOT

from iconformer_mm.checkpoint import load_safetensors

CONFIG = ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'


def train(work_dir, epochs, processes, *arguments):
    options = ['default_hooks.checkpoint.type=AdapterCheckpointHook', 'default_hooks.checkpoint.interval=1']
    options += ['default_hooks.checkpoint.max_keep_ckpts=-1', f'train_cfg.max_epochs={epochs}']
    options += ['train_cfg.val_interval=1', 'train_dataloader.batch_size=25', 'param_scheduler=None']
    arguments = [CONFIG, '--work-dir', work_dir, *arguments, '--cfg-options', *options]
    return tool('train.py', *arguments) if processes == 1 else ranks('train.py', *arguments, processes=processes)


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
