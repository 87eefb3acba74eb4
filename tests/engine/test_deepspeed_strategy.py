"""Adapted models under DeepSpeed's ZeRO: trainings by gloo processes on the CPU, and what is refused."""

from importlib.util import find_spec

import pytest
import torch
from flexible_runs import BF16, ICON, LORA, assert_same, frozen_of, train, train_on, written
from torch import nn

from iconformer_mm.engine import AdapterDeepSpeedStrategy, strategies
from iconformer_mm.engine.deepspeed_strategy import complete_deepspeed

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
    alone = dict(sgd=plain(), adam1=plain(LORA, **ADAM), bfloat16=plain(BF16))
    alone['adam2'] = plain(LORA, **ADAM, **NORM_DECAY)
    for name, options in alone.items():
        frozen[name] = frozen_of(train(tmp_path / name / 'one', **options))
        expected[name] = written(tmp_path / name / 'one')
    for name in jobs.keys() - {'cut', 'bfloat16'}:
        assert_same(written(tmp_path / name), expected[name if name in expected else 'sgd'])
    # Sums in bfloat16 are rounded after other images, so gradients are alike at best.
    (*half, _, groups), (*whole, _, other) = written(tmp_path / 'bfloat16'), expected['bfloat16']
    assert_same((*half, groups), (*whole, other), atol=2e-3)
    assert_same(written(tmp_path / 'cut'), written(tmp_path / 'adam2'), exact=True)
    for name in jobs.keys() - {'cut'}:
        own = frozen[name if name in frozen else 'sgd']
        for rank in range(2):
            kept = torch.load(tmp_path / name / f'frozen_{rank}.pth', weights_only=True)
            assert kept.keys() == own.keys()
            assert all(torch.equal(value, own[n]) and value.dtype == own[n].dtype for n, value in kept.items())


@runs
def test_another_number_of_processes_resumes(tmp_path):
    for name, options in dict(sgd=plain(), adam=plain(LORA, **ADAM)).items():
        train(tmp_path / name / 'one', epochs=3, **options)
        train(tmp_path / name / 'cut', epochs=1, **options)
    jobs = {'sgd/cut': zero(2, epochs=2, resume=True), 'adam/cut': zero(1, LORA, epochs=2, resume=True, **ADAM)}
    train_on(2, tmp_path, jobs)
    train_on(1, tmp_path, {'sgd/cut': zero(1, epochs=3, resume=True)})
    train(tmp_path / 'adam' / 'cut', epochs=3, resume=True, **plain(LORA, **ADAM))
    for name in ('sgd', 'adam'):
        assert_same(written(tmp_path / name / 'cut', 3), written(tmp_path / name / 'one', 3), atol=1e-5)


def test_the_library_is_needed(monkeypatch):
    monkeypatch.setattr(strategies, 'find_spec', lambda name: None)
    for name in ('DeepSpeedStrategy', 'AdapterDeepSpeedStrategy'):
        with pytest.raises(ImportError, match=f"'{name}' needs deepspeed, which is not installed: pip install"):
            strategies.complete_strategy(dict(type=name), 'pytorch')


def test_options_are_kept(tmp_path):
    (tmp_path / 'ds.json').write_text('{"zero_optimization": {"stage": 1}, "fp16": {"enabled": false}}')
    for given in (dict(config=str(tmp_path / 'ds.json')), dict(zero_optimization=dict(stage=2), bf16=None)):
        strategy = dict(type='DeepSpeedStrategy', gradient_clipping=1.0, **given)
        own = dict(type='AdapterDeepSpeedStrategy', train_micro_batch_size_per_gpu=1)
        assert complete_deepspeed(strategy) == strategy | own
    sized = dict(type='DeepSpeedStrategy', config=dict(train_batch_size=8))
    assert complete_deepspeed(sized) == sized | dict(type='AdapterDeepSpeedStrategy')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(bf16=dict(enabled=True)), "casts adapters, too. Leave it out, and hold the base in frozen_dtype='bfloat"),
        (dict(config=dict(fp16=dict(enabled=True))), 'casts adapters, too'),
        (dict(config=dict(optimizer=dict(type='Adam'))), 'the optimizer is the one of `optim_wrapper`'),
        (dict(config=dict(scheduler=dict(type='OneCycle'))), 'schedules are those of `param_scheduler`'),
        (dict(activation_checkpointing=dict(cpu_checkpointing=True)), 'with_cp=True of the PEFTHook'),
        (dict(exclude_frozen_parameters=True), 'AdapterCheckpointHook leaves frozen parameters out'),
        (dict(gradient_accumulation_steps=2), 'a resumed run would lose gradients'),
        (dict(zero_optimization=dict(stage=3)), 'stage=3 splits the adapters'),
        (dict(zero_optimization=dict(stage=2, offload_optimizer=dict(device='cpu'))), 'offload_optimizer is not'),
    ],
)
def test_options_that_cannot_be_kept(options, message):
    with pytest.raises(ValueError, match=message):
        complete_deepspeed(dict(type='DeepSpeedStrategy', **options))


def strategy_of(tmp_path, **options):
    env = dict(launcher='none', randomness=dict(seed=0))
    return AdapterDeepSpeedStrategy(work_dir=str(tmp_path), env_kwargs=env, **options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(type='AmpOptimWrapper'), "its own optimizer wrapper, not AmpOptimWrapper: use type='OptimWrapper'"),
        (dict(accumulative_counts=4), 'accumulative_counts=4 is not supported'),
        (dict(clip_grad=dict(max_norm=1, norm_type=1)), r'must be dict\(max_norm=...\), got'),
        (dict(clip_grad=dict(max_norm=2)), 'max_norm is 2, and gradient_clipping of the strategy 1.0'),
        (dict(dtype='float16'), "'dtype' of `optim_wrapper` is not supported"),
    ],
)
def test_optimizer_wrappers_that_cannot_be_kept(tmp_path, options, message):
    strategy = strategy_of(tmp_path, gradient_clipping=1.0)
    with pytest.raises(ValueError, match=message):
        strategy.check_optim_wrapper(dict(optimizer=dict(type='SGD', lr=0.1), **options))


def test_optimizers_that_need_whole_parameters(tmp_path):
    strategy = strategy_of(tmp_path, zero_optimization=dict(stage=1))
    model = nn.Linear(2, 2)
    strategy.build_optim_wrapper(dict(optimizer=dict(type='Adagrad', lr=0.1)), model)
    with pytest.raises(ValueError, match='updates parts of flattened parameters, which changes Adagrad: use stage 0'):
        strategy._wrap_model(model)


def test_weights_are_not_loaded_into_a_wrapped_model(tmp_path):
    with pytest.raises(RuntimeError, match='weights are loaded before DeepSpeed wraps a model'):
        strategy_of(tmp_path).load_model_state_dict({})
