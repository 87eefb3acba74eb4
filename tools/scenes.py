"""Adapt a tiny Swin to new scenes for three dense tasks by four methods, and compare them."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, init_default_scope
from rich.console import Console

from iconformer_mm import inject
from iconformer_mm.checkpoint.reading import read_checkpoint
from iconformer_mm.comparison.experiments import (
    ROOT,
    Run,
    add_run_arguments,
    check_frozen,
    execute_all,
    make_data,
    make_parser,
    print_table,
    to_markdown,
)
from iconformer_mm.comparison.predictions import PredictionRow, draw_classes, draw_instances, plot_predictions
from iconformer_mm.engine import load_config
from iconformer_mm.tuning import Summary

CONFIGS = ROOT / 'configs' / 'scenes'
BASE = CONFIGS / 'swin-scenes_source.safetensors'
METHODS = {
    'frozen': 'frozen backbone',
    'adaptformer': 'AdaptFormer',
    'icon': 'iCoN',
    'full': 'full fine-tuning',
}
IMAGES = (3, 8)  # of the validation scenes, for the picture


@dataclass(frozen=True)
class Task:
    """One of the three tasks.

    Attributes:
        config: Start of the config files' names.
        metric: Name of the score in mmengine's log.
        title: Title of the score's column.
        factor: What the logged score is multiplied by.
        digits: Digits after the point.
    """

    config: str
    metric: str
    title: tuple[str, str]
    factor: float
    digits: int

    def score(self, run: Run) -> float:
        """Score of a run after training."""
        return self.factor * run.scalars()[-1][self.metric]


TASKS = {
    'semantic': Task('upernet_swin-scenes', 'mIoU', ('semantic', 'mIoU (%)'), 1, 1),
    'instance': Task('mask-rcnn_swin-scenes_fpn', 'coco/segm_mAP', ('instance', 'mask AP (%)'), 100, 1),
    'depth': Task('depth_swin-scenes', 'rmse', ('depth', 'RMSE (m)'), 1, 3),
}


def make_runs(args: argparse.Namespace) -> dict[tuple[str, str], list[Run]]:
    """The runs of each task and method, one a seed."""
    return {
        (task, method): [
            Run(
                CONFIGS / f'{TASKS[task].config}_{method}_target.py',
                args.out / f'{task}_{method}_seed{seed}',
                (f'randomness.seed={seed}', *args.cfg_options),
            )
            for seed in range(args.seeds)
        ]
        for task in args.tasks
        for method in args.methods
    }


def build_model(run: Run) -> tuple[torch.nn.Module, Summary, dict]:
    """Build the adapted model of a run, with its final weights.

    Returns:
        The model in evaluation mode, what it trains, and the config.
    """
    cfg = load_config(str(run.config))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    summary = inject(model, cfg.custom_hooks[0].method)
    model.load_state_dict(read_checkpoint(run.checkpoint())['state_dict'])
    return model.eval(), summary, cfg


def tabulate(runs: dict[tuple[str, str], list[Run]], args: argparse.Namespace) -> list[dict]:
    """Collect scores, shares and times, a dictionary a method."""
    results = []
    for method in args.methods:
        row = dict(method=METHODS[method], tasks={})
        for task in args.tasks:
            group = runs[task, method]
            if method != 'full':
                check_frozen(group, BASE)
            scores = [TASKS[task].score(run) for run in group]
            row['backbone_share'] = build_model(group[0])[1].backbone_share
            row['tasks'][task] = dict(
                scores=scores,
                mean=statistics.mean(scores),
                std=statistics.stdev(scores) if len(scores) > 1 else 0.0,
                train_seconds=statistics.mean(run.train_seconds() for run in group),
            )
        results.append(row)
    return results


def report(results: list[dict], args: argparse.Namespace, console: Console) -> None:
    """Print the table, and write it."""
    titles = [('method', ''), ('backbone', 'share')]
    titles += [TASKS[task].title for task in args.tasks]
    titles += [('seconds', 'a run')]
    rows = []
    for result in results:
        cells = [result['method'], f'{result["backbone_share"]:.1%}']
        for task, numbers in result['tasks'].items():
            digits = TASKS[task].digits
            cells.append(f'{numbers["mean"]:.{digits}f} ± {numbers["std"]:.{digits}f}')
        cells.append(' / '.join(f'{numbers["train_seconds"]:.0f}' for numbers in result['tasks'].values()))
        rows.append(cells)

    title = f'Source to target scenes, mean ± std over {args.seeds} seeds'
    print_table(title, titles, rows, console)
    text = to_markdown([' '.join(words).strip() for words in titles], rows)
    (args.out / 'results.md').write_text(text, encoding='utf-8')
    (args.out / 'results.json').write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')


def draw(runs: dict[tuple[str, str], list[Run]], args: argparse.Namespace) -> None:
    """Draw predictions of the first seed beside the ground truth."""
    rows = []
    for task in args.tasks:
        columns: list[list] = []
        for method in args.methods:
            model, _, cfg = build_model(runs[task, method][0])
            dataset = DATASETS.build(cfg.test_dataloader.dataset)
            palette = (dataset.metainfo or {}).get('palette')
            items = [dataset[index] for index in IMAGES]
            images = [item['inputs'].permute(1, 2, 0).numpy()[..., ::-1] for item in items]
            if not columns:
                columns.append([true_map(task, *pair, palette) for pair in zip(items, images)])
            with torch.no_grad():
                samples = model.test_step(pseudo_collate(items))
            columns.append([predicted_map(task, *pair, palette) for pair in zip(samples, images)])
        rows += [PredictionRow(task, image, maps) for image, *maps in zip(images, *columns)]
    titles = ['ground truth', *(METHODS[method] for method in args.methods)]
    plot_predictions(rows, titles, args.out / 'predictions.png')


def true_map(task: str, item: dict, image, palette):  # noqa: ANN001
    """Picture of the ground truth."""
    sample = item['data_samples']
    if task == 'semantic':
        return draw_classes(sample.gt_sem_seg.data[0].numpy(), palette)
    if task == 'depth':
        return sample.gt_depth_map.data[0].numpy()
    truth = sample.gt_instances
    return draw_instances(image, truth.masks.masks.astype(bool), truth.labels.tolist(), palette)


def predicted_map(task: str, sample, image, palette, threshold: float = 0.5):  # noqa: ANN001
    """Picture of a prediction; of instances those of at least this score."""
    if task == 'semantic':
        return draw_classes(sample.pred_sem_seg.data[0].numpy(), palette)
    if task == 'depth':
        return sample.pred_depth_map.data[0].numpy()
    found = sample.pred_instances[sample.pred_instances.scores >= threshold]
    return draw_instances(image, found.masks.numpy(), found.labels.tolist(), palette)


def main() -> None:
    """Run the tool."""
    parser = make_parser(__doc__, 'work_dirs/scenes')
    add_run_arguments(parser)
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(TASKS))
    parser.add_argument('--methods', nargs='+', choices=list(METHODS), default=list(METHODS))
    args = parser.parse_args()
    console = Console()
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    make_data(Path('data/scenes/target'))

    runs = make_runs(args)

    def describe(run: Run) -> str:
        task = TASKS[run.folder.name.partition('_')[0]]
        return f'{run.folder.name}: {task.title[1]} {task.score(run):.{task.digits}f}'

    execute_all([run for group in runs.values() for run in group], args.jobs, console, describe)
    report(tabulate(runs, args), args, console)
    draw(runs, args)
    for name in ('results.md', 'results.json', 'predictions.png'):
        console.print(f'wrote {args.out / name}')
    console.print('frozen weights: bit-identical to the base in every run but those of full fine-tuning')
    console.print(f'{time.time() - start:.0f} s in all')


if __name__ == '__main__':
    main()
