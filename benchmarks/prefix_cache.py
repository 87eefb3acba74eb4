"""Measure what computing the frozen prefix once saves, and what keeping a few views costs in accuracy.

    python benchmarks/prefix_cache.py --out work_dirs/prefix_cache

DINOv2-S with iCoN in its last 4 of 12 blocks, on 20 images of each class of Fashion-MNIST: the quickstart's config on
real images, with random crops besides its flips. Weights and images are fetched as by ``iconformer quickstart --real``.
On the CPU, times are CPU seconds of the process on one thread, so that other work on the machine counts little. On a
GPU they are seconds, waiting for the GPU after each step. A run that is finished is kept, so the same command goes on
after an interruption.

    python benchmarks/prefix_cache.py --generated --views 4 --seeds 1 --steps 40

measures times without a package index: weights are random, images are noise, and accuracy means nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image

from iconformer_mm.checkpoint.real_base import cache_folder, fetch_base
from iconformer_mm.cli.quickstart_real import CONFIG, settings_of
from iconformer_mm.datasets.few_shot import find_fashion_mnist, write_fashion_mnist
from iconformer_mm.engine import add_peft, build_runner, load_config
from iconformer_mm.files import write_json
from measure import Table, write_results

VIEWS = (4, 1, 2, 8)
UNCACHED, ALL, FULL = 'last 4, uncached', 'all blocks, uncached', 'full fine-tuning'


def read_clock() -> float:
    """Return CPU seconds of the process; on a GPU, seconds after all its work is done."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class StepTimes(Hook):
    """Records the seconds of each training step, its data included."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.begun = 0.0
        self._last = 0.0

    def before_train_epoch(self, runner: Runner) -> None:
        """Start the clock."""
        self.begun = self._last = read_clock()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Read the clock."""
        now = read_clock()
        self.seconds.append(now - self._last)
        self._last = now


def make_config(name: str, seed: int, options: dict[str, Any], out: Path, steps: int) -> Config:
    """The config of a run."""
    cfg = load_config(str(CONFIG))
    add_peft(cfg, 'full' if name == FULL else 'icon')
    cfg.merge_from_dict(options)
    crop = dict(type='RandomResizedCrop', scale=cfg.size, crop_ratio_range=(0.5, 1.0), interpolation='bicubic')
    cfg.train_dataloader.dataset.pipeline[1] = crop
    hook = cfg.default_hooks.peft
    hook.save_adapter = False
    if name not in (ALL, FULL):
        hook.blocks = 'last:4'
    if name.startswith('views'):
        hook.prefix_cache = dict(dir=str(out / 'cache'), views=int(name.split()[1]), dtype='bfloat16')
    if name == FULL:
        cfg.optim_wrapper.optimizer.lr = 5e-5
    cfg.default_hooks.checkpoint = None
    cfg.train_cfg.update(max_iters=steps, val_interval=steps)
    cfg.update(
        randomness=dict(seed=seed),
        work_dir=str(out / 'work'),
        experiment_name=uuid.uuid4().hex,
        log_level='WARNING',
        visualizer=None,
    )
    return cfg


def write_noise(target: Path, classes: int = 10, images: int = 20) -> None:
    """Write images of noise as a folder of folders, for timing."""
    generator = np.random.default_rng(0)
    for split in ('train', 'test'):
        for label in range(classes):
            folder = target / split / f'class {label}'
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = generator.integers(256, size=(28, 28, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{index}.png')


def run(name: str, seed: int, options: dict[str, Any], out: Path, steps: int) -> dict[str, Any]:
    """Train and validate once, or read what was found before."""
    file = out / 'runs' / f'{name.replace(",", "").replace(" ", "-")}-seed{seed}.json'
    if file.is_file():
        return json.loads(file.read_text(encoding='utf-8'))
    runner = build_runner(make_config(name, seed, options, out, steps))
    times = StepTimes()
    runner.register_hook(times, priority='LOWEST')
    start = read_clock()
    runner.train()
    end = read_clock()
    found = dict(
        name=name,
        seed=seed,
        step=statistics.median(times.seconds),
        before=times.begun - start,
        steps=sum(times.seconds),
        run=end - start,
        accuracy=float(runner.message_hub.get_scalar('val/accuracy/top1').current()),
    )
    write_json(file, found)
    print(found, flush=True)
    return found


def tables_of(found: Sequence[dict[str, Any]], images: int, batch: int) -> list[Table]:
    """Times of the first seed, and accuracies of all."""
    names = list(dict.fromkeys(row['name'] for row in found))
    first = {name: next(row for row in found if row['name'] == name) for name in names}
    times = [
        {
            'contestant': name,
            's a step': row['step'],
            's an epoch': row['step'] * images / batch,
            'before (s)': row['before'],
            'whole run (s)': row['run'],
            'step to full': row['step'] / first[FULL]['step'],
            'step to uncached': row['step'] / first[UNCACHED]['step'],
            'run to uncached': row['run'] / first[UNCACHED]['run'] if name != FULL else None,
            'run to all blocks': row['run'] / first[ALL]['run'] if name != FULL else None,
        }
        for name, row in first.items()
    ]
    scores = []
    for name in names:
        values = [row['accuracy'] for row in found if row['name'] == name]
        seeds = ', '.join(f'{v:.1f}' for v in values)
        scores.append({'contestant': name, 'accuracy (%)': statistics.mean(values), 'each seed': seeds})
    formats = {column: '' if column == 'contestant' else '.3f' for column in times[0]}
    return [
        Table('times', formats, times),
        Table('accuracy', {'contestant': '', 'accuracy (%)': '.2f', 'each seed': ''}, scores),
    ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/prefix_cache'), help='folder for the results')
    parser.add_argument('--seeds', type=int, default=3, help='runs of each contestant (3)')
    parser.add_argument('--steps', type=int, default=120, help='steps of a run (120)')
    parser.add_argument('--views', type=int, nargs='+', default=VIEWS, help='sizes of the cache (4 1 2 8)')
    parser.add_argument('--generated', action='store_true', help='random weights and images of noise; for times only')
    args = parser.parse_args()
    torch.set_num_threads(1)
    out = args.out.resolve()
    if not (out / 'data').is_dir():
        if args.generated:
            write_noise(out / 'data')
        else:
            write_fashion_mnist(find_fashion_mnist(cache_folder()), out / 'data')
    classes = sorted(p.name for p in (out / 'data' / 'train').iterdir())
    options = settings_of(Path() if args.generated else fetch_base('mmpretrain'), out / 'data', classes)
    if args.generated:
        options.pop('model.backbone.init_cfg.checkpoint')
        options['model.backbone.init_cfg'] = dict(_delete_=True, type='TruncNormal', layer='Linear', std=0.02)
    if not (out / 'runs').is_dir():
        shutil.rmtree(out / 'cache', ignore_errors=True)  # the first cached run fills it
    names = [UNCACHED, *(f'views {n}' for n in args.views), ALL]
    jobs = [(FULL, 0), *((name, seed) for seed in range(args.seeds) for name in names)]
    found = []
    for name, seed in jobs:
        # Full fine-tuning is only timed.
        found.append(run(name, seed, options, out, args.steps // 6 if name == FULL else args.steps))
        if {FULL, UNCACHED, ALL} <= {row['name'] for row in found}:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU, one thread'
            settings = dict(device=device, torch=torch.__version__, steps=args.steps)
            write_results(out, tables_of(found, 20 * len(classes), 32), settings)


if __name__ == '__main__':
    main()
