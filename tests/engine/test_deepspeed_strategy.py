"""Adapted models under DeepSpeed's ZeRO: trainings by gloo processes on the CPU, and what is refused."""

from importlib.util import find_spec

import pytest
import torch
from flexible_runs import BF16, ICON, LORA, assert_same, frozen_of, tiny, train, train_on, written

from iconformer_mm.engine import build_runner
from iconformer_mm.engine.deepspeed_strategy import complete_deepspeed
from iconformer_mm.engine.strategies import complete_strategy

runs = pytest.mark.skipif(find_spec('deepspeed') is None, reason='deepspeed is not installed')
ADAM = {'optim_wrapper.optimizer': dict(_delete_=True, type='AdamW', lr=1e-2, weight_decay=0.1)}
NORM_DECAY = {'optim_wrapper.paramwise_cfg': dict(norm_decay_mult=0.0, bias_decay_mult=0.0)}  # a group a parameter


def zero(stage, hook=ICON, **changes):
    return dict(
        runner_type='FlexibleRunner',
        strategy=dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=stage)),
        hook=hook,
        custom_hooks=[hook],
        **changes,
    )


def plain(hook=ICON, **changes):
    return dict(hook=hook, custom_hooks=[hook], **changes)


@runs
def test_two_processes_train_as_one_on_the_joint_batch(tmp_path):
    jobs = {
        'sgd0': zero(0),
        'sgd1': zero(1),
        'sgd2': zero(2),
        'adam1': zero(1, LORA, **ADAM),
        'adam2': zero(2, LORA, **ADAM, **NORM_DECAY),
        'bfloat16': zero(2, BF16),
    }
    jobs['cut'] = dict(jobs['adam2'], epochs=1)
    train_on(2, tmp_path, jobs)
    train_on(2, tmp_path, {'cut': dict(jobs['adam2'], resume=True)})
    expected, frozen = {}, {}
    alone = dict(sgd=plain(), adam1=plain(LORA, **ADAM), adam2=plain(LORA, **ADAM, **NORM_DECAY), bfloat16=plain(BF16))
    for name, options in alone.items():
        frozen[name] = frozen_of(train(tmp_path / name / 'one', **options))
        expected[name] = written(tmp_path / name / 'one')
    for name in jobs.keys() - {'cut', 'bfloat16'}:
        assert_same(written(tmp_path / name), expected[name if name in expected else 'sgd'])
    # Sums in bfloat16 are rounded after other images, so gradients are alike at best.
    assert_same(written(tmp_path / 'bfloat16'), expected['bfloat16'], atol=2e-3)
    assert_same(written(tmp_path / 'cut'), written(tmp_path / 'adam2'), exact=True)
    for name in jobs.keys() - {'cut'}:
        own = frozen[name if name in frozen else 'sgd']
        for rank in range(2):
            kept = torch.load(tmp_path / name / f'frozen_{rank}.pth')
            assert kept.keys() == own.keys()
            assert all(torch.equal(value, own[n]) and value.dtype == own[n].dtype for n, value in kept.items())


@runs
def test_another_number_of_processes_resumes(tmp_path):
    for name, options in dict(sgd=plain(), adam=plain(LORA, **ADAM)).items():
        train(tmp_path / name / 'one', epochs=3, **options)
        train(tmp_path / name / 'cut', epochs=1, **options)
    train_on(2, tmp_path, {'sgd/cut': zero(2, epochs=2, resume=True), 'adam/cut': zero(1, LORA, epochs=2, **ADAM, resume=True)})
    train_on(1, tmp_path, {'sgd/cut': zero(1, epochs=3, resume=True)})
    train(tmp_path / 'adam' / 'cut', epochs=3, resume=True, **plain(LORA, **ADAM))
    for name in ('sgd', 'adam'):
        assert_same(written(tmp_path / name / 'cut', 3), written(tmp_path / name / 'one', 3), atol=1e-5)
