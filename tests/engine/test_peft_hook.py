import copy
import json
from types import SimpleNamespace

import pytest
import torch
from families import VIT, image
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from tiny_runs import build, config

import iconformer_mm  # noqa: F401
from iconformer_mm import inject, load_adapter, summarize
from iconformer_mm.engine import PEFTHook, PEFTOptimWrapperConstructor
from iconformer_mm.engine.optim_wrapper_constructor import only_trainable


def state(model):
    return {n: v.clone() for n, v in model.state_dict().items()}


def test_training_leaves_frozen_weights_as_they_were(tmp_path):
    runner = build(tmp_path)
    seen = {}
    init = runner.model.init_weights

    def init_and_remember():
        init()
        seen.update(state(runner.model))

    runner.model.init_weights = init_and_remember
    runner.train()
    after = runner.model.state_dict()
    for name, value in after.items():
        # The head reads the class token alone, so that the filter of the last block is not trained.
        trained = name.startswith('head.') or ('adapter' in name and 'layers.1.adapter_attention.icon' not in name)
        assert torch.equal(value, seen[name]) != trained, name
    optimized = {id(p) for group in runner.optim_wrapper.param_groups for p in group['params']}
    assert optimized == {id(p) for p in runner.model.parameters() if p.requires_grad}
    # The schedulers act on the optimizer that is in use.
    assert runner.optim_wrapper.get_lr()['lr'] == [pytest.approx(1e-3)]


def test_training_writes_its_summary_and_testing_leaves_it(tmp_path):
    runner = build(tmp_path)
    runner.train()
    content = json.loads((tmp_path / 'peft_summary.json').read_text())
    assert content['method'] == 'icon' and content['sites'] == {'mmpretrain ViT': ['layers.0', 'layers.1']}
    trained = sum(p.numel() for p in runner.model.parameters() if p.requires_grad)
    assert content['trainable'] == trained > content['parts']['adapters'][0] > 0
    other = build(tmp_path, load_from=str(tmp_path / 'epoch_2.pth'))
    (tmp_path / 'peft_summary.json').write_text('kept')
    other.test()
    assert (tmp_path / 'peft_summary.json').read_text() == 'kept'


def test_adapter_file_reproduces_the_model(tmp_path):
    runner = build(tmp_path)
    runner.train()
    cfg = config(tmp_path, custom_hooks=[])
    from mmpretrain.registry import MODELS

    model = MODELS.build(cfg.model)
    base = {n: v for n, v in runner.model.backbone.state_dict().items() if 'adapter' not in n}
    model.backbone.load_state_dict(base)
    load_adapter(model, tmp_path / 'adapter.safetensors')
    for m in (model, runner.model):
        m.eval()
    x = image((32, 32), channels=1)
    assert torch.equal(model(x)[0], runner.model(x)[0])


def test_test_and_val_after_train_and_alone(tmp_path):
    runner = build(tmp_path / 'train')
    runner.train()
    expected = runner.test()
    fresh = build(tmp_path / 'test', load_from=str(tmp_path / 'train' / 'epoch_2.pth'))
    assert fresh.test() == expected
    assert summarize(fresh.model).method == 'icon'
    assert build(tmp_path / 'val', load_from=str(tmp_path / 'train' / 'epoch_2.pth')).val() == expected


@pytest.mark.parametrize('options', [{}, dict(frozen_dtype='bfloat16', with_cp=True)], ids=['plain', 'frugal'])
def test_resume_continues_exactly(options, tmp_path):
    """Epoch 2 after a resume equals epoch 2 of the uninterrupted run, optimizer state and schedule included."""
    hook = dict(custom_hooks=[dict(type='PEFTHook', method='icon', **options)])
    whole = build(tmp_path / 'whole', **hook)
    whole.train()
    second = build(tmp_path / 'part', resume=True, load_from=str(tmp_path / 'whole' / 'epoch_1.pth'), **hook)
    second.train()
    assert second.iter == whole.iter
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_ema_copies_the_adapted_model(tmp_path):
    hooks = [dict(type='EMAHook', momentum=0.5), dict(type='PEFTHook', method=dict(type='icon', bottleneck=8))]
    runner = build(tmp_path, custom_hooks=hooks)
    runner.train()
    ema = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook').ema_model.module
    assert summarize(ema).method == 'icon'
    name = 'backbone.layers.0.adapter_attention.up.weight'
    assert ema.state_dict()[name].abs().sum() > 0
    assert not torch.equal(ema.state_dict()[name], runner.model.state_dict()[name])


def test_paramwise_rules_and_other_constructors(tmp_path, caplog):
    rules = dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys={'head': dict(lr_mult=2.0)})
    runner = build(tmp_path / 'a', **{'optim_wrapper.paramwise_cfg': rules})
    runner.train()
    groups = runner.optim_wrapper.optimizer.param_groups
    names = {id(p): n for n, p in runner.model.named_parameters()}
    assert len(groups) == sum(p.requires_grad for p in runner.model.parameters())
    for group in groups:
        (parameter,) = group['params']
        name = names[id(parameter)]
        assert group['initial_lr'] == pytest.approx(2e-2 if 'head' in name else 1e-2)
        assert group['weight_decay'] == (0 if name.endswith('.bias') and 'head' not in name else 0.1)
    assert 'is skipped since its requires_grad' not in caplog.text


def learning_rates(runner):
    names = {id(p): n for n, p in runner.model.named_parameters()}
    groups = runner.optim_wrapper.optimizer.param_groups
    return {names[id(p)]: group['initial_lr'] for group in groups for p in group['params']}


UP = 'backbone.layers.{}.adapter_attention.up.weight'
LAYER_DECAY = {
    'optim_wrapper.constructor': 'LearningRateDecayOptimWrapperConstructor',
    'optim_wrapper.paramwise_cfg.layer_decay_rate': 0.5,
}
SMALL_BACKBONE = {'optim_wrapper.paramwise_cfg.custom_keys': {'backbone': dict(lr_mult=0.1)}}


@pytest.mark.parametrize(
    ('rules', 'rates'),
    [
        (SMALL_BACKBONE, (1e-2, 1e-2)),
        (LAYER_DECAY, (1e-2, 1e-2)),
        ({**SMALL_BACKBONE, 'optim_wrapper.paramwise_cfg.adapter_lr_mult': 3.0}, (3e-2, 3e-2)),
        ({**SMALL_BACKBONE, 'optim_wrapper.paramwise_cfg.adapter_lr_mult': None}, (1e-3, 1e-3)),
        ({**LAYER_DECAY, 'optim_wrapper.paramwise_cfg.adapter_lr_mult': None}, (2.5e-3, 5e-3)),
        ({'optim_wrapper.paramwise_cfg.custom_keys': {'adapter_attention.up': dict(lr_mult=2.0)}}, (2e-2, 2e-2)),
    ],
)
def test_learning_rate_of_adapters(tmp_path, rules, rates):
    """That of the config, whatever a smaller one it gives pre-trained weights, unless adapters are spoken of."""
    runner = build(tmp_path, **rules)
    runner.train()
    found = learning_rates(runner)
    assert found[UP.format(0)] == pytest.approx(rates[0]) and found[UP.format(1)] == pytest.approx(rates[1])
    assert found['head.fc.weight'] == pytest.approx(1e-2)


def test_auto_scale_lr_acts_once(tmp_path):
    runner = build(tmp_path, auto_scale_lr=dict(enable=True, base_batch_size=10))
    runner.train()
    assert [group['initial_lr'] for group in runner.optim_wrapper.param_groups] == [pytest.approx(5e-3)]


def test_a_model_adapted_twice_is_refused(tmp_path):
    runner = build(tmp_path, **{'model.backbone.type': 'ICoNVisionTransformer'})
    with pytest.raises(ValueError, match="adapted already, by 'icon'"):
        runner.train()


def test_a_runner_without_configs_is_refused(tmp_path):
    from mmpretrain.registry import MODELS

    cfg = config(tmp_path)
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    runner = Runner(
        model=model,
        work_dir=str(tmp_path),
        train_dataloader=cfg.train_dataloader,
        train_cfg=cfg.train_cfg,
        optim_wrapper=dict(optimizer=torch.optim.SGD(model.parameters(), lr=0.1)),
        custom_hooks=cfg.custom_hooks,
        default_scope='mmpretrain',
        experiment_name='built',
        log_level='WARNING',
    )
    with pytest.raises(ValueError, match='PEFTHook cannot rebuild the optimizer'):
        runner.train()


def test_a_flexible_runner_of_others_is_refused():
    with pytest.raises(ValueError, match='build the runner by iconformer_mm.engine.build_runner'):
        PEFTHook().before_run(SimpleNamespace(strategy=object()))


def test_registered_backbone_trains_with_our_constructor(tmp_path):
    changes = {
        'model.backbone.type': 'ICoNVisionTransformer',
        'optim_wrapper.constructor': 'PEFTOptimWrapperConstructor',
    }
    runner = build(tmp_path, custom_hooks=[], **changes)
    runner.train()
    count = sum(p.numel() for group in runner.optim_wrapper.param_groups for p in group['params'])
    assert count == summarize(runner.model).trainable


def test_constructor_needs_something_to_train():
    from mmpretrain.models.backbones import VisionTransformer

    model = VisionTransformer(arch=VIT, img_size=64)
    inject(model, 'frozen')
    with pytest.raises(ValueError, match='nothing to train in VisionTransformer'):
        PEFTOptimWrapperConstructor(dict(optimizer=dict(type='SGD', lr=0.1)))(model)
    names = list(copy.deepcopy(model).state_dict())
    with only_trainable(model):
        assert not list(model.parameters())
    assert list(model.state_dict()) == names


@pytest.mark.parametrize('how', ['no_grad', 'detach'])
def test_training_ends_at_once_if_no_gradient_comes_back(tmp_path, how):
    runner = build(tmp_path)
    extract = runner.model.extract_feat

    def extract_feat(*args, **kwargs):
        with torch.set_grad_enabled(how == 'detach'):
            return tuple(feature.detach() for feature in extract(*args, **kwargs))

    runner.model.extract_feat = extract_feat
    with pytest.raises(ValueError, match="no gradient comes back to 'backbone'"):
        runner.train()
    assert runner.iter == 0


def test_gradients_are_seen_with_accumulation_and_in_half_precision(tmp_path):
    wrapper = dict(type='BFloat16OptimWrapper', accumulative_counts=2)
    runner = build(tmp_path, optim_wrapper=wrapper)
    runner.train()
    assert runner.iter == 8 and not any(module._forward_hooks for module in runner.model.modules())
