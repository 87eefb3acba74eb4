"""Adapter checkpoints of two processes."""

import os
import signal
import threading
import time

import torch
from commands import ranks, tool
from conftest import ROOT, free_port
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from iconformer_mm.checkpoint import load_safetensors

CONFIG = ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'


def arguments_of(work_dir, epochs, *arguments):
    options = ['default_hooks.checkpoint.type=AdapterCheckpointHook', 'default_hooks.checkpoint.interval=1']
    options += ['default_hooks.checkpoint.max_keep_ckpts=-1', f'train_cfg.max_epochs={epochs}']
    options += ['train_cfg.val_interval=1', 'train_dataloader.batch_size=25', 'param_scheduler=None']
    return [CONFIG, '--work-dir', work_dir, *arguments, '--cfg-options', *options]


def train(work_dir, epochs, processes, *arguments):
    arguments = arguments_of(work_dir, epochs, *arguments)
    return tool('train.py', *arguments) if processes == 1 else ranks('train.py', *arguments, processes=processes)


def rank_that_is_killed(work_dir, arguments):
    """One of two processes. Rank 1 is killed once, after the first checkpoint."""
    from iconformer_mm.cli.train import main

    def kill():
        while not (work_dir / 'epoch_1.safetensors').exists():
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGKILL)

    restarts = os.environ['TORCHELASTIC_RESTART_COUNT']
    (work_dir.parent / f'rank_{os.environ["RANK"]}_restart_{restarts}').touch()
    if os.environ['RANK'] == '1' and restarts == '0':
        threading.Thread(target=kill, daemon=True).start()
    main([str(argument) for argument in (*arguments, '--launcher', 'pytorch')])


def train_with_a_killed_rank(work_dir, epochs):
    """Train under torchrun's agent, which starts both processes again."""
    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        max_restarts=1,
        rdzv_backend='static',  # as dist_train.sh
        rdzv_endpoint=f'127.0.0.1:{free_port()}',
        rdzv_configs=dict(rank=0),
        run_id=str(work_dir),
        monitor_interval=0.05,
        start_method='forkserver',
    )
    elastic_launch(launcher, rank_that_is_killed)(work_dir, arguments_of(work_dir, epochs, '--resume'))


def final(work_dir, epoch):
    return load_safetensors(str(work_dir / f'epoch_{epoch}.safetensors'))['state_dict']


def test_two_processes_write_once_and_go_on_exactly(tmp_path):
    train(tmp_path / 'whole', 3, 2)
    train_with_a_killed_rank(tmp_path / 'cut', 3)
    assert sorted(p.name for p in tmp_path.glob('rank_*')) == [f'rank_{r}_restart_{n}' for r in (0, 1) for n in (0, 1)]
    assert len(load_safetensors(str(tmp_path / 'cut' / 'epoch_2.safetensors'))['iconformer_mm']['rank_states']) == 2
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
