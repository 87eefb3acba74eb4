"""The learning-rate range test: finds useful learning rates in one short sweep."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from iconformer_mm.engine.config import peft_hooks
from iconformer_mm.figures import REFERENCE, new_figure, save_figure
from iconformer_mm.registry import type_name

SMOOTHING = 0.9
DIVERGENCE = 4.0
SHORTEST = 10  # minimum number of steps of a readable curve


@dataclass
class LRRangeTest:
    """Losses over exponentially rising learning rates.

    Attributes:
        rates: Base learning rate of each step.
        losses: Training loss of each step.
        smoothed: Exponential moving average of the losses, corrected for its start at zero.
        diverged: Whether the smoothed loss grew too far or is not finite. This ends the sweep.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)
    diverged: bool = False

    def add(self, rate: float, loss: float) -> None:
        """Add a step.

        Args:
            rate: Base learning rate of the step.
            loss: Training loss of the step.
        """
        previous = self.smoothed[-1] * (1 - SMOOTHING ** len(self.smoothed)) if self.smoothed else 0.0
        mean = SMOOTHING * previous + (1 - SMOOTHING) * loss
        self.rates.append(rate)
        self.losses.append(loss)
        self.smoothed.append(mean / (1 - SMOOTHING ** len(self.losses)))
        current = self.smoothed[-1]
        lowest = min((value for value in self.smoothed if math.isfinite(value)), default=math.inf)
        grown = len(self.losses) > SHORTEST and current - lowest > (DIVERGENCE - 1) * abs(lowest)
        self.diverged = not math.isfinite(current) or grown

    def suggestions(self) -> dict[str, float]:
        """Suggest learning rates to start with, by the name of the rule. Empty if the loss did not fall.

        ``steepest descent`` is the rate where the smoothed loss falls fastest over the logarithm of the rate.
        ``tenth of the minimum`` is a tenth of the rate with the lowest smoothed loss. The first is bold, the second
        cautious.
        """
        smoothed = np.array(self.smoothed)[np.isfinite(self.smoothed)]
        lowest = int(smoothed.argmin()) if len(smoothed) else 0
        if len(smoothed) < SHORTEST or lowest < 2:
            return {}
        slopes = np.gradient(smoothed[: lowest + 1], np.log(self.rates[: lowest + 1]))
        return {
            'steepest descent': self.rates[int(slopes.argmin())],
            'tenth of the minimum': self.rates[lowest] / 10,
        }


class LRRangeTestHook(Hook):
    """Increases the learning rate from small to large during training and records the losses.

    This is the range test of Smith, "Cyclical Learning Rates for Training Neural Networks" (2015, section 3.3), with
    an exponential sweep and smoothed losses. The stopping rule and the suggestions are ours. The training loop must be
    iteration-based and have no schedulers; :func:`prepare_config` takes care of that. Parameter groups keep their
    ratios to the base learning rate.

    Args:
        min_lr: Base learning rate of the first step. Defaults to 1e-6.
        max_lr: Base learning rate of the last step. Defaults to 1.
        num_iters: Number of steps. Defaults to 100.
        on_step: Function to call after each step. Defaults to None.

    Attributes:
        test: The recorded losses.

    Raises:
        ValueError: The rates are not positive and rising, or the steps are too few.
    """

    def __init__(
        self,
        min_lr: float = 1e-6,
        max_lr: float = 1.0,
        num_iters: int = 100,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        if not 0 < min_lr < max_lr < math.inf:
            raise ValueError(f'the learning rates must be positive and rise, got {min_lr:g} to {max_lr:g}')
        if num_iters < SHORTEST:
            raise ValueError(f'a sweep needs at least {SHORTEST} steps, got {num_iters}')
        self.schedule = np.geomspace(min_lr, max_lr, num_iters).tolist()
        self.on_step = on_step
        self.test = LRRangeTest()
        self._factors: list[float] = []

    def before_train(self, runner: Runner) -> None:
        """Store each group's ratio to the base learning rate.

        Raises:
            ValueError: There are several optimizers, or the base learning rate is not positive.
        """
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            raise ValueError('the range test needs a config with one optimizer')
        base = runner.cfg.optim_wrapper.optimizer.get('lr')
        if base is None or base <= 0:
            raise ValueError(f'the range test needs a positive `optim_wrapper.optimizer.lr` to scale, got {base}')
        self._factors = [group['lr'] / base for group in runner.optim_wrapper.param_groups]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Set the learning rate of the step."""
        rate = self.schedule[runner.iter]
        for group, factor in zip(runner.optim_wrapper.param_groups, self._factors):
            group['lr'] = rate * factor

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Record the mean loss over all processes, and end the sweep if it diverged."""
        assert outputs is not None  # a training step returns its losses
        loss = outputs['loss'].detach().clone()
        all_reduce(loss, 'mean')
        self.test.add(self.schedule[runner.iter], float(loss))
        runner.train_loop.stop_training = self.test.diverged
        if self.on_step is not None:
            self.on_step()


def prepare_config(cfg: Config, num_iters: int) -> None:
    """Change a training config to one for a range test, which saves nothing.

    The loop counts iterations, and :class:`LRRangeTestHook` controls the learning rate. Validation, checkpoints, the
    adapter file and curves are switched off.

    Args:
        cfg: The config. It is changed in place.
        num_iters: Number of steps.
    """
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=num_iters, val_interval=num_iters + 1)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.param_scheduler = None
    cfg.auto_scale_lr = None
    cfg.resume = False
    sampler = cfg.train_dataloader.get('sampler')
    if sampler is not None and type_name(sampler) == 'DefaultSampler':  # no class of a user's that derives from it
        # By iterations, MMEngine waits for two seconds at the end of each epoch. This sampler has no end.
        kept = {key: sampler[key] for key in ('shuffle', 'seed') if key in sampler}
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler', **kept)
    cfg.visualizer = None
    cfg.log_level = 'WARNING'
    cfg.merge_from_dict({'default_hooks.checkpoint': None, 'log_processor.by_epoch': False})
    for hook in peft_hooks(cfg):
        hook['save_adapter'] = False


def plot_lr_range_test(test: LRRangeTest, path: Path) -> None:
    """Plot losses against learning rates, with the suggested rates.

    Args:
        test: The finished test.
        path: Image file to write.
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    axes.plot(test.rates, test.losses, color='C0', alpha=0.3, linewidth=1, label='loss')
    axes.plot(test.rates, test.smoothed, color='C0', linewidth=1.8, label='smoothed')
    for index, (name, rate) in enumerate(test.suggestions().items(), 1):
        axes.axvline(rate, label=f'{name}: {rate:.2g}', **{**REFERENCE, 'color': f'C{index}'})
    finite = [loss for loss in test.smoothed if math.isfinite(loss)]
    if finite:  # a loss that explodes at the end would flatten the rest
        low, high = min(*finite, *test.losses), max(finite[: max(1, len(finite) // 2)])
        axes.set_ylim(low - 0.1 * (high - low or 1), high + 0.4 * (high - low or 1))
    axes.set(xscale='log', xlabel='learning rate', ylabel='training loss')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    save_figure(figure, path)
