"""Mixed precision on a CPU, with whatever a config for a GPU has."""

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from tiny_runs import config
from torch import nn

from iconformer_mm.engine import BFloat16OptimWrapper, build_runner
from iconformer_mm.engine import config as configs

SGD = dict(type='SGD', lr=0.1)


def wrapper(**options):
    return Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', optimizer=dict(SGD), **options)))


@pytest.mark.parametrize('scale', ['dynamic', 512.0, 512, dict(init_scale=2.0), None])
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16', None])
def test_what_is_about_float16_is_dropped_and_the_rest_kept(scale, dtype, monkeypatch):
    monkeypatch.setattr(configs, 'is_cuda_available', lambda: False)
    kept = dict(accumulative_counts=4, clip_grad=dict(max_norm=1.0), constructor='A', paramwise_cfg=dict(b=1))
    cfg = wrapper(loss_scale=scale, dtype=dtype, use_fsdp=False, opt_level='O1', **kept)
    configs.use_amp(cfg)
    assert cfg.optim_wrapper.to_dict() == dict(type='BFloat16OptimWrapper', optimizer=SGD, **kept)


def test_on_a_gpu_they_are_kept(monkeypatch):
    monkeypatch.setattr(configs, 'is_cuda_available', lambda: True)
    cfg = wrapper(loss_scale=512, dtype='bfloat16', opt_level='O1')
    configs.use_amp(cfg)
    assert cfg.optim_wrapper.to_dict() == dict(
        type='AmpOptimWrapper', optimizer=SGD, loss_scale=512.0, dtype='bfloat16'
    )
    cfg = Config(dict(optim_wrapper=dict(optimizer=dict(SGD), loss_scale=None)))
    configs.use_amp(cfg)
    assert cfg.optim_wrapper.loss_scale == 'dynamic'


@pytest.mark.parametrize('optim_wrapper', [None, dict(constructor='A', one=dict(type='OptimWrapper', optimizer=SGD))])
def test_none_or_several_are_refused(optim_wrapper):
    with pytest.raises(ValueError, match='--amp: the config needs a single `optim_wrapper`'):
        configs.use_amp(Config(dict(optim_wrapper=optim_wrapper)))


def test_a_config_for_a_gpu_without_one(monkeypatch):
    monkeypatch.setattr(configs, 'get_device', lambda: 'cpu')
    with pytest.raises(ValueError, match='mixed precision on a GPU .* add --amp, which uses bfloat16'):
        configs.check_precision(wrapper())
    configs.check_precision(Config(dict(optim_wrapper=dict(optimizer=SGD))))
    configs.check_precision(Config(dict()))


def test_the_wrapper_takes_the_options_of_the_other():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    made = BFloat16OptimWrapper(loss_scale='dynamic', dtype='bfloat16', optimizer=optimizer, accumulative_counts=2)
    assert isinstance(made, OptimWrapper) and made._accumulative_counts == 2
    with made.optim_context(model):
        assert model(torch.ones(1, 4)).dtype == torch.bfloat16
    with made.optim_context(nn.Identity()):  # of which no device is known
        pass
    with pytest.raises(ValueError, match="computes in 'bfloat16', got dtype='float16'"):
        BFloat16OptimWrapper(dtype='float16', optimizer=optimizer)


def test_a_run_with_loss_scaling_in_its_config(tmp_path, monkeypatch):
    monkeypatch.setattr(configs, 'is_cuda_available', lambda: False)
    cfg = config(tmp_path, **{'train_cfg.max_epochs': 1})
    cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic', dtype='float16', accumulative_counts=2)
    configs.use_amp(cfg)
    cfg.experiment_name = 'amp-on-a-cpu'
    runner = build_runner(cfg)
    runner.train()
    assert type(runner.optim_wrapper) is BFloat16OptimWrapper and runner.iter == 4
