"""One base, two adapters: which digit is it, and by how much was it turned?

    python examples/two_tasks.py

Trains an adapter with a head for each task on the quickstart's frozen base,
writes both to files, loads them into one model, and classifies the same images
with each in turn. Half a minute on a CPU.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from mmengine.registry import init_default_scope
from mmpretrain.registry import DATASETS, MODELS
from torch import Tensor, nn

from iconformer_mm import disabled, inject, load_adapter, save_adapter, set_adapter
from iconformer_mm.datasets.classification import digits  # noqa: F401 (registers the data set)
from iconformer_mm.engine import load_config

CONFIG = Path(__file__).resolve().parent.parent / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'
TURNS = ('upright', 'a quarter turn', 'half a turn', 'three quarters')
STEPS = 100
TESTED = 300  # images


def load_images(cfg, part: str) -> tuple[Tensor, Tensor]:
    """All images, (N, 1, 28, 28), and labels of a part of the digits."""
    items = [*DATASETS.build(cfg[f'{part}_dataloader'].dataset)]
    labels = torch.cat([item['data_samples'].gt_label for item in items])
    return torch.stack([item['inputs'] for item in items]).float().sub(40).div(80), labels


def turned(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every image in all four turns, and the number of the turn."""
    images_turned = torch.cat([images.rot90(k, dims=(2, 3)) for k in range(4)])
    return images_turned, torch.arange(4).repeat_interleave(len(images))


def build_base(cfg, num_classes: int) -> nn.Module:
    """The pre-trained model with a new head."""
    cfg.model.head.num_classes = num_classes
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Train what is not frozen."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    for _ in range(STEPS):
        batch = torch.randperm(len(images))[:50]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch], mode='tensor'), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Accuracy in percent."""
    model.eval()
    return 100 * (model(images, mode='tensor').argmax(dim=1) == labels).float().mean().item()


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    cfg = load_config(str(CONFIG))
    init_default_scope(cfg.default_scope)
    images, labels = load_images(cfg, 'train')
    test_images, test_labels = (each[:TESTED] for each in load_images(cfg, 'test'))
    tasks = {
        'digit': (10, (images, labels), (test_images, test_labels)),
        'turn': (4, turned(images), turned(test_images)),
    }
    with tempfile.TemporaryDirectory() as folder:
        for task, (num_classes, training, _) in tasks.items():
            model = build_base(cfg, num_classes)
            inject(model, 'icon', bottleneck=16)
            train(model, *training)
            save_adapter(model, Path(folder) / f'{task}.safetensors', task=task)

        # One model for both.
        model = build_base(cfg, 10)
        load_adapter(model, Path(folder) / 'digit.safetensors', name='digit')
        other_head = dict(head=dict(type='LinearClsHead', num_classes=4, in_channels=96))
        load_adapter(model, Path(folder) / 'turn.safetensors', name='turn', parts=other_head)
        for task in ('digit', 'turn', 'digit'):
            start = time.perf_counter()
            set_adapter(model, task)
            switched = 1000 * (time.perf_counter() - start)
            print(f'{task}: {accuracy(model, *tasks[task][2]):.1f} %, switched in {switched:.1f} ms')

        question = test_images[:1].rot90(1, dims=(2, 3))
        set_adapter(model, 'turn')
        turn = model(question, mode='tensor').argmax().item()
        set_adapter(model, 'digit')
        digit = model(question.rot90(-turn, dims=(2, 3)), mode='tensor').argmax().item()
        print(f'an image, turned: {TURNS[turn]}; turned back it is a {digit} (truly a {test_labels[0]})')
        with disabled(model):
            print(f'without its adapter the digit head gets {accuracy(model, test_images, test_labels):.1f} %')


if __name__ == '__main__':
    main()
