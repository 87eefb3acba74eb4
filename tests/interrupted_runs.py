"""Trainings that end in the middle, as by a signal, and what they leave."""

import uuid

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from tiny_runs import config

from iconformer_mm.engine import build_runner


class Interrupted(Exception):
    pass


@HOOKS.register_module()
class InterruptHook(Hook):
    """Ends the run after an iteration, as a signal would; checkpoints come before it."""

    priority = 'LOWEST'

    def __init__(self, at):
        self.at = at

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.at:
            raise Interrupted


def make(work_dir, *, interrupt=None, resume=False, loop='epoch', custom_hooks=(), **changes):
    """A run of 4 epochs of 4 iterations with all that is random: order, flips, dropout."""
    cfg = config(work_dir)
    cfg.model.backbone.drop_rate = 0.1
    for name in ('train_dataloader', 'val_dataloader'):
        cfg[name].dataset.pipeline = [dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]
    hook = dict(type='AdapterCheckpointHook', interval=1, max_keep_ckpts=2, save_best='accuracy/top1')
    if loop == 'epoch':
        cfg.train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
        cfg.param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, T_max=4)]
    else:
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=16, val_interval=3)
        cfg.param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=False, T_max=16)]
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
        cfg.log_processor = dict(by_epoch=False)
        hook.update(by_epoch=False, interval=4)
    cfg.default_hooks = dict(checkpoint=hook)
    cfg.custom_hooks = [*cfg.custom_hooks, *custom_hooks]
    if interrupt is not None:
        cfg.custom_hooks.append(dict(type='InterruptHook', at=interrupt))
    cfg.resume = resume
    cfg.merge_from_dict(changes)
    cfg.experiment_name = uuid.uuid4().hex
    return build_runner(cfg)


def state(runner):
    return {name: value.clone() for name, value in runner.model.state_dict().items()}


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
