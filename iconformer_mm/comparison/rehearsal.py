"""One step of a run and one batch of its validation, so that mistakes show before time is spent."""

from __future__ import annotations

import copy
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from iconformer_mm.engine import build_runner

from .single_run import begin, check_metric, make_config


class FirstStepTaken(Exception):
    """The first training step succeeded."""


class FirstStepHook(Hook):
    """Ends a training after its first step."""

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """End it.

        Raises:
            FirstStepTaken: Always.
        """
        raise FirstStepTaken


def rehearse(settings: dict[str, Any], base: Path, folder: Path) -> None:
    """Build all that a run needs, train one step, and validate on one batch. Nothing is kept.

    There is no prefix cache, which would take a pass over all images. Its options are checked.

    Args:
        settings: Of the run, see :class:`iconformer_mm.comparison.spec.Run`.
        base: Pre-trained weights.
        folder: Work folder with the output, ``output.log``. It stays if something is wrong.

    Raises:
        ValueError: A setting is unknown, or the validation lacks the metric.
        Exception: What is built or run with the settings fails.
    """
    begin(folder)
    cfg = make_config(settings, base, folder)
    HOOKS.build(copy.deepcopy(cfg.default_hooks.peft))
    cfg.default_hooks.peft.pop('prefix_cache', None)
    runner = build_runner(cfg)
    runner.register_hook(FirstStepHook(), priority='LOWEST')
    with suppress(FirstStepTaken):
        runner.train()
    given = metrics_of_a_batch(runner)
    if given:
        check_metric(settings['metric'], given)
    shutil.rmtree(folder)


def metrics_of_a_batch(runner: Runner) -> list[str]:
    """Names of the metrics that the validation of one batch gives; none where they need all images.

    Raises:
        Exception: The model or the pipeline of the validation fails.
    """
    data = next(iter(runner.val_dataloader))
    runner.model.eval()
    with torch.no_grad():
        outputs = runner.model.val_step(data)
    evaluator = runner.val_evaluator
    evaluator.process(data_samples=outputs, data_batch=data)
    try:
        return list(evaluator.evaluate(len(outputs)))
    except Exception:  # the real validation, of all images, may succeed
        return []
