"""Trainings of seconds under MMEngine's FlexibleRunner, in one process and in several."""

import json
import os
import uuid

import torch
import torch.multiprocessing as mp
from conftest import free_port
from mmengine.registry import init_default_scope
from tiny_runs import config

from iconformer_mm.checkpoint import load_safetensors, read_adapter
from iconformer_mm.checkpoint.tuned_state import frozen_state
from iconformer_mm.engine import AdapterDeepSpeedStrategy, FullyShardStrategy, build_runner, leave_process_group
from iconformer_mm.tuning.backbones import unwrap

ICON = dict(type='PEFTHook', method=dict(type='icon', bottleneck=8))
LORA = dict(type='PEFTHook', method=dict(type='lora', rank=2), with_cp=True, unfreeze=['cls_token'])
BF16 = dict(type='PEFTHook', method=dict(type='icon', bottleneck=8), frozen_dtype='bfloat16')


def tiny(folder, batch_size=10, epochs=2, hook=ICON, **changes):
    cfg = config(
        folder,
        **{
            'train_cfg.max_epochs': epochs,
            'train_dataloader.batch_size': batch_size,
            'optim_wrapper.optimizer': dict(_delete_=True, type='SGD', lr=0.05, momentum=0.9),
            # With an `end`, a run that is cut has the schedule of a whole one.
            'param_scheduler': [dict(type='MultiStepLR', by_epoch=True, milestones=[1], gamma=0.1, end=9)],
            'optim_wrapper.clip_grad': dict(max_norm=1.0),
            'default_hooks.checkpoint': dict(type='AdapterCheckpointHook', interval=1),
            'custom_hooks': [hook, dict(type='AdapterStatisticsHook', interval=1)],
            **changes,
        },
    )
    cfg.experiment_name = uuid.uuid4().hex
    init_default_scope('mmpretrain')
    return cfg


def train(folder, **options):
    runner = build_runner(tiny(folder, **options))
    runner.train()
    return runner


def work(rank, world, folder, port, jobs, total):
    """One process of several: it trains each job in turn."""
    import mmpretrain.datasets  # noqa: F401
    from tiny_runs import VIT  # noqa: F401

    os.environ.update(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world)
    )
    torch.set_num_threads(1)
    for name, options in jobs.items():
        runner = train(f'{folder}/{name}', batch_size=total // world, launcher='pytorch', **options)
        if isinstance(runner.strategy, FullyShardStrategy):
            whole = sum(p.numel() for p in runner.model.parameters())
            held = sum(p.to_local().numel() for p in runner.model.parameters())
            assert held < 1.2 * whole / world
        if isinstance(runner.strategy, AdapterDeepSpeedStrategy):
            torch.save(frozen_of(runner), f'{folder}/{name}/frozen_{rank}.pth')
    leave_process_group()


def frozen_of(runner):
    """Frozen parameters and buffers."""
    return {n: v.clone() for n, v in frozen_state(unwrap(runner.model)).items()}


def train_on(world, folder, jobs, total=10):
    """Train on several processes, with ``total`` images in a step."""
    arguments = (world, str(folder), free_port(), jobs, total)
    mp.start_processes(work, args=arguments, nprocs=world, start_method='forkserver')


def written(folder, epoch=2):
    """All that a training leaves: the adapter file and its checkpoint."""
    content, tensors = read_adapter(folder / 'adapter.safetensors')
    checkpoint = load_safetensors(str(folder / f'epoch_{epoch}.safetensors'))
    slots = {
        f'{index}.{name}': value
        for index, slot in checkpoint['optimizer']['state'].items()
        for name, value in slot.items()
    }
    groups = checkpoint['optimizer']['param_groups']
    return content, dict(tensors), dict(checkpoint['state_dict']), slots, groups


def assert_same(actual, expected, exact=False, atol=2e-6):
    content, *parts, groups = actual
    other, *others, other_groups = expected
    assert content == other and json.dumps(groups) == json.dumps(other_groups)
    for part, wanted in zip(parts, others):
        assert part and part.keys() == wanted.keys()
        for name, value in wanted.items():
            if exact:
                assert torch.equal(part[name], value), name
            else:
                torch.testing.assert_close(part[name], value, atol=atol, rtol=1e-4, msg=name)
