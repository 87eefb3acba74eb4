"""A class is the same class however a config names it."""

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook, Hook

from iconformer_mm.engine import AdapterCheckpointHook, PEFTHook, add_peft, build_runner
from iconformer_mm.engine.config import method_of, names_weights
from iconformer_mm.registry import is_type, type_name


class OwnHook(PEFTHook):
    pass


LAZY = """
from mmengine.config import read_base

from iconformer_mm.engine import PEFTHook

custom_hooks = [dict(type=PEFTHook, method=dict(type='icon', bottleneck=8))]
"""


def lazy_hook(tmp_path):
    (tmp_path / 'lazy.py').write_text(LAZY)
    return Config.fromfile(tmp_path / 'lazy.py').custom_hooks[0]


@pytest.mark.parametrize(
    'kind', ['PEFTHook', 'mmengine.PEFTHook', 'iconformer_mm.engine.hooks.peft_hook.PEFTHook', PEFTHook]
)
def test_names_and_classes(kind):
    for config in (dict(type=kind), ConfigDict(type=kind)):
        assert is_type(config, 'PEFTHook') and is_type(config, 'CheckpointHook', 'PEFTHook')
        assert not is_type(config, 'CheckpointHook') and not is_type(config, 'Hook2')
        assert type_name(config) == 'PEFTHook'


def test_other_forms(tmp_path):
    assert is_type(lazy_hook(tmp_path), 'PEFTHook')
    assert is_type(PEFTHook(), 'PEFTHook') and is_type(dict(type=OwnHook), 'PEFTHook')
    assert is_type(dict(type=AdapterCheckpointHook), 'AdapterCheckpointHook')
    assert not is_type(dict(type=CheckpointHook), 'AdapterCheckpointHook')
    assert not is_type({}, 'PEFTHook') and type_name({}) == ''
    assert not is_type(dict(type=Hook), 'PEFTHook')


@pytest.mark.parametrize('form', ['name', 'path', 'class', 'lazy', 'object'])
def test_the_hook_is_found_in_every_form(form, tmp_path):
    method = dict(type='icon', bottleneck=8)
    hook = dict(
        name=lambda: dict(type='PEFTHook', method=method),
        path=lambda: dict(type='iconformer_mm.engine.PEFTHook', method=method),
        lazy=lambda: lazy_hook(tmp_path),
        object=lambda: PEFTHook(method=method),
        **{'class': lambda: dict(type=PEFTHook, method=method)},
    )[form]()
    cfg = Config(dict(model=dict(), custom_hooks=[hook]))
    assert method_of(cfg)['method'] == method
    add_peft(cfg, 'lora')
    assert cfg.custom_hooks == [] and method_of(cfg) == dict(method=dict(type='lora'))


def test_weights_named_by_a_class():
    from mmengine.model import PretrainedInit

    assert names_weights(dict(backbone=dict(init_cfg=dict(type=PretrainedInit, checkpoint='a.pth'))))


def test_a_run_with_classes_for_types(tmp_path):
    """Nothing but classes where names usually stand, from training to the file."""
    from tiny_runs import config

    hooks = [dict(type=PEFTHook, method=dict(type='icon', bottleneck=8))]
    checkpoint = dict(type=AdapterCheckpointHook, interval=1)
    cfg = config(tmp_path, custom_hooks=hooks, **{'default_hooks.checkpoint': checkpoint, 'train_cfg.max_epochs': 1})
    cfg.experiment_name = 'classes-for-types'
    build_runner(cfg).train()
    assert (tmp_path / 'adapter.safetensors').is_file() and (tmp_path / 'epoch_1.safetensors').is_file()
    cfg = config(tmp_path, custom_hooks=hooks, resume=True, **{'default_hooks.checkpoint': checkpoint})
    cfg.randomness = dict()
    cfg.experiment_name = 'classes-for-types-resumed'
    runner = build_runner(cfg)
    assert runner.seed == 0  # that of the resumed run
    runner.train()
    assert runner.epoch == 2


def test_synchronised_norms_in_every_form():
    from torch import nn

    from iconformer_mm.engine.launch import _replace_sync_bn

    model = dict(a=[dict(type='SyncBN'), dict(type=nn.SyncBatchNorm), dict(type='torch.nn.SyncBatchNorm')])
    model['b'] = dict(norm_cfg=dict(type='BN', requires_grad=True), other=dict(type='LN'))
    _replace_sync_bn(model)
    assert [norm['type'] for norm in model['a']] == ['BN'] * 3 and model['b']['other']['type'] == 'LN'
