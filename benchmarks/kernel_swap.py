"""Measure what an iCoN model loses when its images get kernels that are not theirs.

    python tools/compare.py configs/comparison/real.yaml --out work_dirs/real
    python benchmarks/kernel_swap.py work_dirs/real/runs/*/icon/seed0.json --out work_dirs/kernel_swap

A comparison keeps the adapter file of the first seed of each method beside its result, and this script reads both. The
validation images are seen once to record the kernels of every image, and once for each swap: all kernels of another
image, the mean kernel over images, and random kernels of the same mean and deviation. Differences are paired, image by
image, with 95 % bootstrap intervals over images. An average precision, in percent, is no mean over images and has no
interval.

A second table says, layer by layer, which share of the kernels' variance lies between images (the rest lies between
channels), and which share of that lies between classes, backgrounds and conditions. Backgrounds and conditions are on
record in data sets that ``iconformer data`` wrote.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from rich.progress import track

from iconformer_mm.analysis.kernel_probe import share_between_groups, share_between_images, whole_images
from iconformer_mm.analysis.kernel_swap import SWAPS, KernelBank, given_kernels
from iconformer_mm.checkpoint.real_base import fetch_base
from iconformer_mm.comparison.image_scores import ImageScores, observe
from iconformer_mm.comparison.single_run import finds_nothing, make_config
from iconformer_mm.comparison.spec import FETCHED, ROOT
from iconformer_mm.datasets.conditions import RECORD
from iconformer_mm.datasets.objects import SOURCES
from iconformer_mm.inference import AdapterInferencer
from measure import Table, write_results

RESAMPLES = 10_000
GROUPS = ('classes', 'backgrounds', 'conditions')


def load(result: Path) -> tuple[AdapterInferencer, Any, dict[str, Any]]:
    """Return the adapted model of a run, the config, and the settings.

    Raises:
        SystemExit: The run kept no adapter file.
    """
    adapter = result.with_suffix('.safetensors')
    if not adapter.is_file():
        raise SystemExit(f'{adapter} does not exist: a comparison keeps the adapter of the first seed of each method')
    settings = json.loads(result.read_text(encoding='utf-8'))['settings']
    name = settings['base']
    base = fetch_base(name.removeprefix(FETCHED)) if name.startswith(FETCHED) else ROOT / name
    cfg = make_config(settings, base, result.parent)
    return AdapterInferencer(cfg, adapter=adapter), cfg, settings


@dataclass(frozen=True)
class Scored:
    """The score of all images, in percent where it is a share, and what each adds to it if it is a mean over images."""

    score: float
    images: ImageScores | None


def evaluate(model: Any, loader: Any, evaluator_cfg: Any, metric: str, progress: str) -> Scored:
    """Score the images of a loader, one by one.

    Raises:
        SystemExit: The metric is neither a mean over images nor an average precision.
    """
    evaluator = Evaluator(evaluator_cfg)
    evaluator.dataset_meta = loader.dataset.metainfo
    noted = observe(evaluator, metric)
    with torch.no_grad(), whole_images(model):
        for batch in track(loader, description=progress):
            evaluator.process(model.val_step(batch), batch)
    found = evaluator.evaluate(len(loader.dataset))
    if metric.startswith('coco/'):
        return Scored(0.0 if finds_nothing(metric, found) else 100 * found[metric], None)
    if not noted:
        raise SystemExit(f'{metric} is no mean over images, so a swap cannot be compared image by image')
    return Scored(noted[-1].score(), noted[-1])


def difference(own: Scored, swapped: Scored, seed: int = 0) -> dict[str, float]:
    """Return what a swap lost, and the bounds of its 95 % bootstrap interval over images."""
    lost = dict(lost=own.score - swapped.score)
    if own.images is None or swapped.images is None:
        return lost
    number = len(own.images.numerators)
    images = np.random.default_rng(seed).integers(number, size=(RESAMPLES, number))
    low, high = np.nanpercentile(own.images.scores(images) - swapped.images.scores(images), (2.5, 97.5))
    return dict(**lost, low=float(low), high=float(high))


def groups_of(dataset: Any) -> dict[str, list[Any]]:
    """Return the class of each image of a classifier's data set, and its condition and background where on record."""
    samples = [dataset.get_data_info(index) for index in range(len(dataset))]
    groups = {'classes': [sample.get('gt_label') for sample in samples]}
    paths = [Path(sample['img_path']).resolve() for sample in samples]
    conditions = find_record(paths[0], RECORD)
    if conditions is not None:
        root, found = conditions
        groups['conditions'] = [found[path.relative_to(root).as_posix()] for path in paths]
    sources = find_record(paths[0], SOURCES)
    if sources is not None:
        root, found = sources
        groups['backgrounds'] = [source_of(found, path, root)[0] for path in paths]
    return groups


def source_of(found: dict[str, Any], image: Path, root: Path) -> list[str]:
    """Return what an image shows. The record has a list for each folder, or for train, val and test."""
    folder = image.parent.relative_to(root).as_posix()
    if folder not in found:  # images/testing of ADE20K's format, test2017 of COCO's
        folder = next(split for split in found if image.parent.name.startswith(split))
    number = int(image.stem.rpartition('_')[2])
    return found[folder][number]


def find_record(image: Path, name: str) -> tuple[Path, Any] | None:
    """Return the folder above an image that holds a record, and the record."""
    folder = next((each for each in image.parents if (each / name).is_file()), None)
    return None if folder is None else (folder, json.loads((folder / name).read_text(encoding='utf-8')))


def share_rows(task: str, bank: KernelBank, groups: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Share out the variance of the kernels of each layer."""
    rows = []
    for layer, tensor in bank.kernels.items():
        kernels = tensor.float().cpu().numpy()
        row = dict(task=task, layer=layer, images=share_between_images(kernels))
        for name, members in groups.items():
            if 1 < len(set(members)) < len(members):
                row[name] = share_between_groups(kernels, members)
        rows.append(row)
    return rows


def rows_of(result: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure one run: what swaps cost, and the shares of the kernels' variance."""
    inferencer, cfg, settings = load(result)
    model = inferencer.model.eval()
    loader_cfg = cfg.val_dataloader
    loader_cfg.update(num_workers=0, persistent_workers=False)
    loader_cfg.sampler = dict(type='DefaultSampler', shuffle=False)
    if inferencer.scope == 'mmpretrain':
        loader_cfg.setdefault('collate_fn', dict(type='default_collate'))
    loader = Runner.build_dataloader(loader_cfg)
    task = result.parent.parent.name
    bank = KernelBank()
    with bank.recording(model):
        own = evaluate(model, loader, cfg.val_evaluator, settings['metric'], f'{task}: own')
    rows = [dict(task=task, kernels='own', score=own.score)]
    for swap in SWAPS[1:]:
        with given_kernels(model, bank.swapped(swap)):
            found = evaluate(model, loader, cfg.val_evaluator, settings['metric'], f'{task}: {swap}')
        rows.append(dict(task=task, kernels=swap, score=found.score, **difference(own, found)))
    return rows, share_rows(task, bank, groups_of(loader.dataset))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('results', type=Path, nargs='+', help='results of runs of iCoN with adapters beside them')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/kernel_swap'), help='folder for the results')
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    shares: list[dict[str, Any]] = []
    columns = {'task': '', 'kernels': '', 'score': '.2f', 'lost': '.2f', 'low': '.2f', 'high': '.2f'}
    share_columns = {'task': '', 'layer': '', 'images': '.3f', **dict.fromkeys(GROUPS, '.3f')}
    for result in args.results:
        found, found_shares = rows_of(result)
        rows += found
        shares += found_shares
        tables = [Table('swapped kernels', columns, rows), Table('shares of variance', share_columns, shares)]
        write_results(args.out, tables, dict(resamples=RESAMPLES))


if __name__ == '__main__':
    main()
