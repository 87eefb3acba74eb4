"""The benchmarks of the paper's scale: tasks, runs, and what the paper claims of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .spec import ROOT

METHODS = ('icon', 'adaptformer', 'frozen', 'full')
PAPER = 'arXiv:2409.02838, abstract'
_BETTER = 'iCoN better than full fine-tuning and other PEFT'
_COMPARABLE = 'iCoN comparable to full fine-tuning, better than other PEFT'


@dataclass(frozen=True)
class PaperTask:
    """A task of the paper.

    Attributes:
        model: The config that is run unless others are asked for, with METHOD in place of the method.
        train_images: Number of its training images.
        shape: Height and width of a training image in pixels, for estimates.
        metric: Name of the metric.
        factor: What it is multiplied by in tables.
        claim: What the paper's abstract claims, in words. The numbers of its tables are not kept here.
    """

    model: str
    train_images: int
    shape: tuple[int, int]
    metric: str
    factor: float
    claim: str

    def __post_init__(self) -> None:
        assert 'METHOD' in self.model


_VIT = 'vit-base-p16-mae_METHOD_8xb128-100e_'
TASKS = {
    'cifar100': PaperTask(_VIT + 'cifar100', 50_000, (224, 224), 'accuracy/top1', 1, _BETTER),
    'svhn': PaperTask(_VIT + 'svhn', 73_257, (224, 224), 'accuracy/top1', 1, _BETTER),
    'food101': PaperTask(_VIT + 'food101', 75_750, (224, 224), 'accuracy/top1', 1, _BETTER),
    'coco': PaperTask(
        'cascade-mask-rcnn_swin-b-in22k_fpn_METHOD_ms-crop-3x_coco', 117_266, (800, 1216), 'coco/segm_mAP', 100, _BETTER
    ),
    'ade20k': PaperTask(
        'swin-large-in22k_upernet_METHOD_8xb2-160k_ade20k-512x512', 20_210, (512, 512), 'mIoU', 1, _COMPARABLE
    ),
    'nyu': PaperTask('depth_swinv2-base_METHOD_8xb3-25k_nyu', 795, (480, 480), 'rmse', 1, _COMPARABLE),
}


def models_of(task: str) -> list[str]:
    """All configs of a task, with METHOD in place of the method.

    Args:
        task: Name of the task.
    """
    return sorted(path.stem.replace('_icon_', '_METHOD_') for path in (ROOT / 'configs' / task).glob('*_icon_*.py'))


@dataclass(frozen=True)
class PaperRun:
    """A training of a config, and its test.

    Attributes:
        task: Name of the task.
        model: The config, with METHOD in place of the method.
        method: Name of the method.
    """

    task: str
    model: str
    method: str

    @property
    def name(self) -> str:
        """Name of the config."""
        return self.model.replace('METHOD', self.method)

    @property
    def config(self) -> Path:
        """The config's file."""
        return ROOT / 'configs' / self.task / f'{self.name}.py'

    def result(self, out: Path) -> Path:
        """Where the result is written, below a folder."""
        return out / self.task / f'{self.name}.json'

    def read(self, out: Path) -> dict[str, Any] | None:
        """The result; None if the run is not finished.

        Args:
            out: Folder of all results.

        Raises:
            ValueError: The file is damaged.
        """
        path = self.result(out)
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
            assert isinstance(content['settings'], dict) and isinstance(content['metrics'], dict)
            float(content['metrics'][TASKS[self.task].metric])
        except (ValueError, KeyError, TypeError, AssertionError):
            raise ValueError(f'{path} is damaged; remove it, and the run is tested again') from None
        return content
