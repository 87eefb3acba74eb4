"""Adapters together with what MMEngine offers for training."""

import uuid

import pytest
import torch
from tiny_runs import config

from iconformer_mm.checkpoint import load_safetensors
from iconformer_mm.engine import build_runner


def build(work_dir, **changes):
    hook = dict(type='AdapterCheckpointHook', interval=1)
    cfg = config(work_dir, **{'default_hooks.checkpoint': hook, **changes})
    cfg.experiment_name = uuid.uuid4().hex
    return build_runner(cfg)


def adapters(runner):
    return {n: p.detach().clone() for n, p in runner.model.named_parameters() if 'adapter' in n}


def test_bfloat16_on_the_cpu(tmp_path):
    seen = set()
    exact = build(tmp_path / 'a')
    exact.train()
    half = build(tmp_path / 'b', **{'optim_wrapper.type': 'BFloat16OptimWrapper'})
    half.model.backbone.layers[0].ffn.layers[1].register_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype)
    )
    half.train()
    # Training in bfloat16, validation as MMEngine has it, in float32.
    assert seen == {torch.bfloat16, torch.float32}
    for name, value in adapters(half).items():
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert (value - adapters(exact)[name]).norm() < 0.3 * adapters(exact)[name].norm() + 1e-3, name


@pytest.mark.parametrize('counts', [2, 4])
def test_accumulation_equals_the_joint_batch(tmp_path, counts):
    """On plain SGD: two passes over parts of a batch are one over it."""
    plain = {
        'optim_wrapper.optimizer': dict(_delete_=True, type='SGD', lr=0.1),
        'train_cfg.max_epochs': 1,
        'param_scheduler': None,
    }
    joint = build(tmp_path / 'joint', **plain, **{'train_dataloader.batch_size': 20})
    joint.train()
    parts = {'train_dataloader.batch_size': 20 // counts, 'optim_wrapper.accumulative_counts': counts}
    accumulated = build(tmp_path / 'parts', **plain, **parts)
    accumulated.train()
    for name, value in adapters(joint).items():
        torch.testing.assert_close(adapters(accumulated)[name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_clipping_bounds_the_gradients_of_adapters(tmp_path):
    norms = []
    runner = build(tmp_path, **{'optim_wrapper.clip_grad': dict(max_norm=1e-3)})

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group['params']]
            norms.append(torch.stack([g.norm() for g in grads]).norm())
            assert len(grads) == sum(p.requires_grad for p in runner.model.parameters())
            return super().step(closure)

    from mmengine.registry import OPTIMIZERS

    OPTIMIZERS.register_module(module=Watch, name='Watch', force=True)
    runner.cfg.optim_wrapper.optimizer = dict(type='Watch', lr=0.1)
    runner.train()
    assert norms and max(norms) <= 1e-3 * (1 + 1e-4)


def test_early_stopping_ends_the_run_and_leaves_its_checkpoint(tmp_path):
    stop = dict(type='EarlyStoppingHook', monitor='accuracy/top1', patience=1, min_delta=200.0)
    peft = dict(type='PEFTHook', method=dict(type='icon', bottleneck=8))
    runner = build(tmp_path, **{'custom_hooks': [peft, stop], 'train_cfg.max_epochs': 9})
    runner.train()
    assert runner.epoch < 9
    state = load_safetensors(str(tmp_path / f'epoch_{runner.epoch}.safetensors'))['state_dict']
    assert all(torch.equal(value, state[name]) for name, value in adapters(runner).items())
    assert (tmp_path / 'adapter.safetensors').exists()


def test_auto_scale_lr(tmp_path):
    runner = build(tmp_path, auto_scale_lr=dict(enable=True, base_batch_size=10))  # the batch is 5
    runner.train()
    assert {group['initial_lr'] for group in runner.optim_wrapper.param_groups} == {5e-3}
