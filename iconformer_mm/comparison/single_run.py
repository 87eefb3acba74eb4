"""One run of a comparison: from its settings to its file.

The fork server imports this module, and by it the libraries, once for all runs.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Collection, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import mmengine
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from safetensors.torch import load_file
from torch import nn

import iconformer_mm
from iconformer_mm import summarize
from iconformer_mm.engine import add_peft, build_runner, exempt_from_collection, load_config
from iconformer_mm.engine.config import merge_options
from iconformer_mm.files import written_whole
from iconformer_mm.inference.predictions import kind_of
from iconformer_mm.messages import hint
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import backbones_of
from iconformer_mm.tuning.quantised_weight import held_weights

from .image_scores import ImageScores, observe
from .peak_memory import PeakMemoryHook
from .spec import ROOT

CURVE_POINTS = 50
SCORE = 0.5  # of instances that are drawn

for _library in ('mmpretrain', 'mmdet', 'mmseg'):
    if find_spec(_library) is not None:
        import_module(f'{_library}.utils').register_all_modules(init_default_scope=False)


class Diverged(Exception):
    """The loss is no number any more."""


class DivergenceHook(Hook):
    """Ends a training whose loss is infinite or no number."""

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Look at the loss.

        Raises:
            Diverged: It is infinite or no number.
        """
        assert outputs is not None  # a training step gives its losses
        if not outputs['loss'].isfinite():
            raise Diverged


class ImageScoresHook(Hook):
    """Notes what each test image adds to the score."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.noted: list[ImageScores] = []

    def before_run(self, runner: Runner) -> None:
        """Listen to the metric."""
        self.noted = observe(runner.val_evaluator, self.metric)

    def of(self, score: float | None) -> dict[str, list] | None:
        """What each image added in the last validation; None of a score that is no mean over images.

        Raises:
            RuntimeError: It does not sum up to the score.
        """
        if score is None or not self.noted:
            return None
        found = self.noted[-1]
        if not found.sum_up_to(score):
            raise RuntimeError(f'the images add up to {self.metric} {found.score()}, and the validation gave {score}')
        return found.to_json()


def train_and_validate(
    settings: dict[str, Any],
    base: Path,
    folder: Path,
    result: Path,
    keep_adapter: bool = False,
    pictures: Sequence[int] = (),
) -> None:
    """Train and validate on one core, and write the result.

    Args:
        settings: All that determines the result, see :class:`iconformer_mm.comparison.spec.Run`.
        base: Pre-trained weights, which frozen ones are compared with.
        folder: Work folder with the output, ``output.log``; removed in the end.
        result: File to write.
        keep_adapter: Whether to keep the adapter file, beside the result (``.safetensors``). Defaults to False.
        pictures: Test images of which the predictions are kept, by index, in a file beside it (``.npz``).

    Raises:
        RuntimeError: A frozen tensor changed.
        ValueError: A setting is unknown, or the validation lacks the metric.
    """
    begin(folder)
    runner = build_runner(make_config(settings, base, folder, keep_adapter))
    exempt_from_collection()
    memory = PeakMemoryHook()
    runner.register_hook(memory)  # before the hook that ends a training in the middle of a step
    runner.register_hook(DivergenceHook())
    image_scores = ImageScoresHook(settings['metric'])
    runner.register_hook(image_scores)
    score = train(runner, settings['metric'])
    content = dict(
        settings=settings,
        score=score,
        curve=loss_curve(runner),
        train_seconds=sum(history(runner, 'train/time')),
        peak_memory=memory.peak(),
        **count(runner.model),
        images=image_scores.of(score),
        frozen_weights_checked=check_frozen_weights(runner.model, base),
        versions={module.__name__: module.__version__ for module in (torch, mmengine, iconformer_mm)},
    )
    if pictures and score is not None:
        keep_predictions(runner, pictures, result.with_suffix('.npz'))
    adapter = folder / 'adapter.safetensors'
    if keep_adapter and adapter.is_file():
        content['adapter_bytes'] = adapter.stat().st_size
        os.replace(adapter, result.with_suffix('.safetensors'))
    # A key a line: short, and readable in a diff.
    lines = ',\n'.join(f'{json.dumps(key)}: {json.dumps(value)}' for key, value in content.items())
    with written_whole(result) as temporary:
        temporary.write_text(f'{{\n{lines}\n}}\n', encoding='utf-8')
    shutil.rmtree(folder)


def begin(folder: Path) -> None:
    """Make an empty work folder, write all output to ``output.log`` in it, and take one core."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / 'output.log', 'w') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)


def make_config(settings: dict[str, Any], base: Path, folder: Path, save_adapter: bool = False) -> Config:
    """The config of a run, which writes no checkpoints. A base that was fetched is loaded into the backbone.

    Raises:
        ValueError: The method, one of its options or a setting among ``options`` is unknown.
    """
    cfg = load_config(str(ROOT / settings['config']))
    own = {key: value for key, value in settings['options'].items() if key.startswith('custom_imports')}
    if own:  # they may register the method
        cfg.merge_from_dict(own)
        import_modules_from_strings(**cfg.custom_imports)
    add_peft(cfg, settings.get('method') or settings['methods'])
    cfg.default_hooks.peft.save_adapter = save_adapter
    merge_options(cfg, settings['options'], 'options')
    if 'base' in settings:
        cfg.merge_from_dict({'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=str(base))})
    cfg.merge_from_dict(
        {
            'optim_wrapper.optimizer.lr': settings['learning_rate'],
            'randomness.seed': settings['seed'],
            'default_hooks.checkpoint': None,
            'work_dir': str(folder),
        }
    )
    # Without formatting, which takes seconds and serves the log only.
    return Config(cfg.to_dict(), filename=cfg.filename, format_python_code=False)


def train(runner: Runner, metric: str) -> float | None:
    """Train, validate at the end, and give the score; None if the training diverged.

    Raises:
        ValueError: The validation did not give the metric.
    """
    try:
        runner.train()
    except Diverged:
        return None
    except Exception:
        # Weights that are no numbers may fail before there is a loss.
        if all(torch.isfinite(parameter).all() for parameter in runner.model.parameters()):
            raise
        return None
    given = [name.removeprefix('val/') for name in runner.message_hub.log_scalars if name.startswith('val/')]
    check_metric(metric, given)
    if metric not in given:
        return 0.0
    score = runner.message_hub.get_scalar(f'val/{metric}').current()
    return float(score) if math.isfinite(score) else None


def check_metric(metric: str, given: Collection[str]) -> None:
    """Check that a validation gave a metric, or that it found nothing to measure.

    Args:
        metric: Name of the metric.
        given: Names of the metrics that it gave.

    Raises:
        ValueError: It gave others.
    """
    if metric not in given and not finds_nothing(metric, given):
        raise ValueError(f"the validation gives no metric '{metric}'{hint(metric, given)}; it gives {', '.join(given)}")


def finds_nothing(metric: str, given: Collection[str]) -> bool:
    """Whether a detector found nothing, so that it scores 0: CocoMetric gives no numbers then.

    Args:
        metric: Name of the metric.
        given: Names of the metrics that an evaluation gave.
    """
    return metric.startswith('coco/') and not any(name.startswith('coco/') for name in given)


def history(runner: Runner, name: str) -> list[float]:
    """All values of a scalar, one a training step; none if there was no step."""
    if name not in runner.message_hub.log_scalars:
        return []
    return [float(value) for value in runner.message_hub.get_scalar(name).data[0]]


def loss_curve(runner: Runner) -> list[list[float]]:
    """Pairs of a step and the mean loss of the steps up to it, about ``CURVE_POINTS`` of them."""
    losses = [loss for loss in history(runner, 'train/loss') if math.isfinite(loss)]
    size = math.ceil(len(losses) / CURVE_POINTS) or 1
    blocks = [losses[start : start + size] for start in range(0, len(losses), size)]
    ends = [min(size * (index + 1), len(losses)) for index in range(len(blocks))]
    return [[end, round(sum(block) / len(block), 6)] for end, block in zip(ends, blocks)]


def count(model: nn.Module) -> dict[str, int | float]:
    """What the method trains."""
    summary = summarize(model)
    return dict(
        trained_parameters=summary.trainable,
        trained_backbone=sum(summary.parts.get(part, (0, 0))[0] for part in ('backbone', 'adapters')),
        backbone_share=summary.backbone_share,
    )


def check_frozen_weights(model: nn.Module, base: Path) -> bool:
    """Compare the backbone with the base, bit by bit; False where the method freezes nothing.

    Each adapted module is compared. Of a module beyond the backbone the base has the names in the model.

    Raises:
        RuntimeError: A frozen parameter changed, or the base lacks it.
    """
    injection = get_injection(model)
    if injection is None or not injection.method.freezes:
        return False
    towers, content = backbones_of(model), load_file(base)
    for path, tower in towers.items():
        places = (f'{path}.', 'backbone.', '')  # in the base; one of a backbone alone may have no prefix
        prefix = next(place for place in places if any(name.startswith(place) for name in content))
        weights = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
        precisions = [precision for precision in injection.precisions if precision.module is tower]
        _check_frozen(tower, weights, precisions, f'{path or "backbone"}.', base)
    return True


def _check_frozen(
    tower: nn.Module, weights: dict[str, torch.Tensor], precisions: Sequence[Any], prefix: str, base: Path
) -> None:
    """Compare one adapted module with its weights in the base, by their names in it."""
    state = {name: p.detach().cpu() for name, p in tower.named_parameters() if not is_adapter(name)}
    if not weights.keys() & state.keys():  # the backbone wraps another library's model, as TIMMFeatures does
        wrapper = next(iter(state)).partition('.')[0]
        weights = {f'{wrapper}.{name}': value for name, value in weights.items()}
    for precision in precisions:
        weights = {name: precision.rounded(name, value) for name, value in weights.items()}
        state |= {name: weight.unpacked().cpu() for name, weight in held_weights(tower)}
    missing = [name for name in state if name not in weights]
    if missing:
        raise RuntimeError(f'{base} lacks {prefix}{missing[0]}, which is frozen: it is not the base of this model')
    # The base may have more: the norms of stages that a head does not read.
    for name, value in state.items():
        if not torch.equal(weights[name], value):
            raise RuntimeError(f'after training: the frozen tensor {prefix}{name} changed in training')


def keep_predictions(runner: Runner, indices: Sequence[int], path: Path) -> None:
    """Write what a trained model predicts on some test images, as maps to be drawn.

    Args:
        runner: The run, with dense predictions.
        indices: The images.
        path: File to write, with ``images`` (N, H, W, 3), and ``truth`` and ``predicted``: maps (N, H, W) in metres,
            or pictures (N, H, W, 3).
    """
    model = runner.model
    dataset = DATASETS.build(runner.cfg.test_dataloader.dataset)
    palette = (dataset.metainfo or {}).get('palette') or ()
    items = [dataset[index] for index in indices]
    images = [image_of(item) for item in items]
    samples = [copy.deepcopy(item['data_samples']) for item in items]
    model.eval()
    with torch.no_grad():
        predictions = model.test_step(pseudo_collate(items))
    kind = kind_of(predictions[0])
    drawn: dict[str, Any] = dict(
        images=np.stack(images),
        truth=np.stack([kind.picture(s, i, palette, 'gt') for s, i in zip(samples, images)]),
        predicted=np.stack([kind.picture(s, i, palette, 'pred', SCORE) for s, i in zip(predictions, images)]),
    )
    with written_whole(path) as temporary, open(temporary, 'wb') as file:
        np.savez_compressed(file, **drawn)


def image_of(item: dict[str, Any]) -> np.ndarray:
    """The image of a test item, (H, W, 3), RGB, in the size of its file, which predictions and ground truth have."""
    image = np.ascontiguousarray(item['inputs'].permute(1, 2, 0).numpy()[..., ::-1])
    height, width = item['data_samples'].ori_shape
    return image if image.shape[:2] == (height, width) else cv2.resize(image, (width, height))
