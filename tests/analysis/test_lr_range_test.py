"""The range test, on a loss whose course is known in closed form."""

import json
import math
import uuid

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from tiny_runs import config
from torch import nn

from iconformer_mm.analysis.lr_range_test import (
    SMOOTHING,
    LRRangeTest,
    LRRangeTestHook,
    plot_lr_range_test,
    prepare_config,
)
from iconformer_mm.engine import build_runner

CURVATURE = 20.0


@MODELS.register_module()
class Parabola(BaseModel):
    """loss = curvature / 2 * w^2 + curvature / 2 * slow^2, by two parameter groups."""

    def __init__(self):
        super().__init__()
        self.fast, self.slow = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for layer in (self.fast, self.slow):
            nn.init.constant_(layer.weight, 1.0)

    def forward(self, mode='loss', **data):
        return dict(loss=CURVATURE / 2 * (self.fast.weight**2 + self.slow.weight**2).sum())


def run(work_dir, cfg, hook):
    prepare_config(cfg, len(hook.schedule))
    cfg.work_dir, cfg.experiment_name = str(work_dir), uuid.uuid4().hex
    runner = build_runner(cfg)
    runner.register_hook(hook)
    runner.train()
    return runner


def parabola(**optimizer):
    paramwise = dict(custom_keys=dict(slow=dict(lr_mult=0.1)))
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(type='Parabola'),
            train_dataloader=dict(
                batch_size=2,
                dataset=dict(type='Strokes', num_images=4, num_classes=2, image_size=8, pipeline=[]),
                sampler=dict(type='DefaultSampler', shuffle=False),
            ),
            optim_wrapper=dict(optimizer=dict(dict(type='SGD', lr=0.5), **optimizer), paramwise_cfg=paramwise),
            train_cfg=dict(by_epoch=True, max_epochs=3),
            param_scheduler=[dict(type='MultiStepLR', by_epoch=True, milestones=[1], gamma=0.1)],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
        )
    )


def reference(rates):
    """Gradient descent on the parabola: each weight shrinks by 1 - rate * curvature a step."""
    fast, slow, losses = 1.0, 1.0, []
    for rate in rates:
        losses.append(CURVATURE / 2 * (fast**2 + slow**2))
        fast *= 1 - rate * CURVATURE
        slow *= 1 - 0.1 * rate * CURVATURE  # the ratio of its group is kept
    return losses


def test_the_sweep_follows_the_closed_form(tmp_path):
    hook = LRRangeTestHook(1e-4, 10.0, 60)
    run(tmp_path, parabola(), hook)
    test = hook.test
    assert test.rates == pytest.approx([1e-4 * 10 ** (5 * i / 59) for i in range(len(test.rates))])
    assert test.losses == pytest.approx(reference(test.rates), rel=1e-4)
    # Smoothed as weights say: the newest counts most, and all sum to one.
    for count in (1, 7, len(test.losses)):
        weights = [SMOOTHING ** (count - 1 - i) for i in range(count)]
        mean = sum(w * loss for w, loss in zip(weights, test.losses)) / sum(weights)
        assert test.smoothed[count - 1] == pytest.approx(mean)
    # Beyond 2 / curvature = 0.1 a step overshoots; it ended before the last rate, far above the minimum.
    assert test.diverged and 0.1 < test.rates[-1] < 10
    assert test.smoothed[-1] > 4 * min(test.smoothed) and test.smoothed[-2] <= 4 * min(test.smoothed)
    suggestions = test.suggestions()
    lowest = test.rates[int(np.argmin(test.smoothed))]
    assert suggestions['tenth of the minimum'] == pytest.approx(lowest / 10)
    assert 1e-4 < suggestions['steepest descent'] < lowest
    json.dumps(vars(test))


def test_nothing_is_kept(tmp_path):
    """An adapted model by its epoch-based config: no checkpoints, no adapter file, no validation."""
    hook = LRRangeTestHook(1e-5, 1e-2, 12)
    runner = run(tmp_path, config(tmp_path), hook)
    assert len(hook.test.losses) == 12 and not hook.test.diverged
    assert any('adapter' in name for name, _ in runner.model.named_parameters())
    rates = [group['lr'] for group in runner.optim_wrapper.param_groups]
    assert rates == pytest.approx([1e-2] * len(rates))
    assert not [path for path in tmp_path.rglob('*') if path.suffix in ('.pth', '.safetensors')]
    assert 'val/accuracy/top1' not in runner.message_hub.log_scalars


def test_suggestions_of_a_known_curve():
    """A loss that falls as a logistic function of the log rate falls fastest in its middle, at 1e-3."""
    test = LRRangeTest()
    test.rates = np.geomspace(1e-6, 1.0, 121).tolist()
    x = np.log10(test.rates)
    test.smoothed = (1 - 1 / (1 + np.exp(-4 * (x + 3))) + np.where(x > -1, (x + 1) * 2, 0)).tolist()
    assert test.suggestions() == pytest.approx({'steepest descent': 1e-3, 'tenth of the minimum': 1e-2})


@pytest.mark.parametrize('losses', [[], [1.0] * 5, list(range(30)), [math.nan] * 20])
def test_no_suggestion_where_nothing_falls(losses):
    test = LRRangeTest()
    for index, loss in enumerate(losses):
        test.add(10.0**index, loss)
    assert test.suggestions() == {}


@pytest.mark.parametrize('loss', [math.nan, math.inf, 1e4])
def test_divergence_ends_it(loss):
    test = LRRangeTest()
    for index in range(12):
        test.add(1e-6 * 2**index, 1.0)
        assert not test.diverged
    test.add(1.0, loss)
    assert test.diverged


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [((1e-2, 1e-3, 50), 'positive and rise'), ((0, 1, 50), 'positive and rise'), ((1e-6, 1, 3), 'at least 10 steps')],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        LRRangeTestHook(*arguments)


def test_a_base_rate_of_zero_cannot_be_scaled(tmp_path):
    with pytest.raises(ValueError, match='needs a positive `optim_wrapper.optimizer.lr`'):
        run(tmp_path, parabola(lr=0.0), LRRangeTestHook(num_iters=20))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('losses', [[2.0] * 5 + [1.0, 0.5, 0.2, 0.1, 0.3, 9.0], [1.0] * 3, [math.nan] * 12])
def test_a_range_test_is_plotted(tmp_path, losses):
    test = LRRangeTest()
    for index, loss in enumerate(losses):
        test.add(1e-4 * 2**index, loss)
    plot_lr_range_test(test, tmp_path / 'p.png')
    assert len(np.unique(cv2.imread(str(tmp_path / 'p.png')).reshape(-1, 3), axis=0)) > 50


class _OwnSampler(DefaultSampler):
    """As a project of a user's would have one."""


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        (dict(type='DefaultSampler', shuffle=False), dict(type='InfiniteSampler', shuffle=False)),
        (dict(type='DefaultSampler', seed=7), dict(type='InfiniteSampler', seed=7)),
        (dict(type=_OwnSampler, shuffle=True), dict(type=_OwnSampler, shuffle=True)),
    ],
)
def test_a_sampler_without_end_is_taken_where_nothing_else_changes(given, expected, tmp_path):
    cfg = config(tmp_path)
    cfg.train_dataloader.sampler = given
    prepare_config(cfg, 5)
    assert cfg.train_dataloader.sampler == expected
