"""Run the benchmarks of the paper's scale: CIFAR-100, SVHN, Food-101, COCO, ADE20K and NYU-v2.

plan shows what is there and what is missing, and estimates memory and GPU hours. prepare unpacks downloaded data and
fetches weights. run trains and tests; a finished run is not run again, and one that was cut off goes on. table prints
the results beside the paper's claim.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table

from iconformer_mm.analysis.training_cost import A100_FLOAT, A100_HALF, UTILISATION, training_cost
from iconformer_mm.comparison.markdown import to_markdown
from iconformer_mm.comparison.paper import METHODS, PAPER, TASKS, PaperRun, models_of
from iconformer_mm.comparison.single_run import finds_nothing
from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.published import PUBLISHED
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import build_model, merge_options, method_of
from iconformer_mm.files import expanded, write_json, written_whole
from iconformer_mm.tuning import get_injection, inject

from . import convert_nyu
from .errors import user_errors
from .parser import ConfigOptions, Parser

BATCH = 'train_dataloader.batch_size'
BEGUN = 'settings.json'  # of a work folder
STAGES = ('plan', 'prepare', 'run', 'table')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('stage', nargs='?', choices=STAGES, default='plan', help='what to do (plan)')
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=list(TASKS), metavar='TASK', help='(all)')
    parser.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS), metavar='METHOD', help='(all)')
    parser.add_argument(
        '--models',
        nargs='+',
        metavar='START',
        help='configs whose name begins so, such as mask-rcnn_swin-t; or all (the main one of each task)',
    )
    parser.add_argument('--gpus', type=int, default=8, help='GPUs of a run (8); the batch in all stays the same')
    parser.add_argument('--data-root', type=expanded, default=Path('data'), help='folder of all data sets (data)')
    parser.add_argument('--archives', type=expanded, help='folder of what was downloaded (DATA_ROOT/downloads)')
    parser.add_argument('--out', type=expanded, default=Path('work_dirs/paper'), help='results (work_dirs/paper)')
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, help='override settings of every config')
    args = parser.parse_args(argv)
    if args.gpus < 1:
        parser.error(f'--gpus must be at least 1, got {args.gpus}')
    args.archives = args.archives or args.data_root / 'downloads'
    return args


def runs_of(args: argparse.Namespace) -> list[PaperRun]:
    """The runs that the command line asks for.

    Raises:
        ValueError: No config's name begins so.
    """
    chosen: list[tuple[str, str]] = []
    for task in args.tasks:
        for model in models_of(task):
            if model == TASKS[task].model if args.models is None else _matches(model, args.models):
                chosen.append((task, model))
    if not chosen:
        known = ', '.join(model for task in args.tasks for model in models_of(task))
        raise ValueError(f'--models {" ".join(args.models)}: no config begins so; there are {known}')
    return [PaperRun(task, model, method) for task, model in chosen for method in args.methods]


def _matches(model: str, words: Sequence[str]) -> bool:
    return any(word == 'all' or model.startswith(word) for word in words)


def batch_of(run: PaperRun, cfg: Config) -> int:
    """Images of a step of the recipe, on all GPUs."""
    named = re.search(r'_(\d+)xb(\d+)-', run.name)
    return (cfg.get('auto_scale_lr') or {}).get('base_batch_size') or (int(named[1]) * int(named[2]) if named else 16)


def options_of(run: PaperRun, cfg: Config, args: argparse.Namespace) -> dict[str, Any]:
    """What is set of a config: where its data is, and the batch on one GPU, so that the recipe's batch is kept.

    Raises:
        ValueError: The batch cannot be shared evenly by the GPUs.
    """
    folder = args.data_root / PUBLISHED[run.task].folder
    loaders = ('train', 'val', 'test')
    options: dict[str, Any] = {f'{name}_dataloader.dataset.data_root': f'{folder}/' for name in loaders}
    if run.task == 'coco':
        annotations = str(folder / 'annotations' / 'instances_val2017.json')
        options.update({f'{name}_evaluator.ann_file': annotations for name in ('val', 'test')})
    total = batch_of(run, cfg)
    if total % args.gpus:
        raise ValueError(f'{run.name}: its batch of {total} images cannot be shared evenly by {args.gpus} GPUs')
    return {**options, BATCH: total // args.gpus, **(args.cfg_options or {})}


def config_of(run: PaperRun, args: argparse.Namespace) -> tuple[Config, dict[str, Any]]:
    """The config as it is run, and what was set of it."""
    cfg = load_config(str(run.config))
    options = options_of(run, cfg, args)
    merge_options(cfg, options)
    return cfg, options


def weights_of(cfg: Config) -> str | None:
    """File or address of the pre-trained weights of a config; None if it begins without."""
    init = cfg.model.backbone.get('init_cfg') or {}
    return init.get('checkpoint') or cfg.model.get('pretrained')


def place_of(weights: str) -> Path:
    """Where a file of weights is, or MMEngine looks for it before it downloads it."""
    if '://' not in weights:
        return Path(weights)
    return Path(torch.hub.get_dir(), 'checkpoints', weights.rpartition('/')[2])


def fetch_weights(run: PaperRun, weights: str | None) -> None:
    """Download weights that are not there; their hash is checked where it is part of the name.

    Raises:
        ValueError: They cannot be downloaded, are damaged, or must be converted by the user.
    """
    if weights is None or place_of(weights).is_file():
        return
    if '://' not in weights:
        raise ValueError(
            f'{run.name} reads its weights from {weights}, which does not exist: convert them as the README of '
            "MMSegmentation's config of that backbone says"
        )
    place = place_of(weights)
    place.parent.mkdir(parents=True, exist_ok=True)
    found = re.search(r'-([0-9a-f]{8})\.pth$', weights)
    try:
        torch.hub.download_url_to_file(weights, str(place), found and found[1])
    except (URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f'the weights of {run.name} cannot be downloaded ({error}): download {weights} elsewhere and put it at '
            f'{place}'
        ) from error


def images_of(cfg: Config, task: str, batch: int) -> int:
    """Images that a training sees, each time counted."""
    epochs = cfg.train_cfg.get('max_epochs')
    return epochs * TASKS[task].train_images if epochs else cfg.train_cfg.max_iters * batch


def plan(runs: list[PaperRun], args: argparse.Namespace, console: Console) -> None:
    """Print what each run needs."""
    table = Table(title=f'estimates for {args.gpus} GPUs', title_justify='left')
    for column in ('config', 'images', 'steps', 'trained', 'GiB a GPU', 'GPU hours', 'data', 'weights'):
        table.add_column(
            column, justify='left' if column in ('config', 'data', 'weights') else 'right', overflow='fold'
        )
    notes: dict[str, None] = {}
    for run in runs:
        cfg, options = config_of(run, args)
        each = options[BATCH]
        images = images_of(cfg, run.task, each * args.gpus)
        weights = weights_of(cfg)
        half = cfg.optim_wrapper.get('type') == 'AmpOptimWrapper'
        model = build_model(cfg)
        if get_injection(model) is None and (method := method_of(cfg)) is not None:
            inject(model, **method)
        cost = training_cost(model, TASKS[run.task].shape, images, each, half, run.method == 'frozen')
        published = PUBLISHED[run.task]
        data_there = not published.missing(args.data_root)
        weights_there = weights is None or place_of(weights).is_file()
        if not data_there:
            notes[f'{run.task}: download {" and ".join(published.files)} into {args.archives}, then `prepare`'] = None
        if not weights_there:
            action = '`prepare` downloads' if '://' in str(weights) else 'convert, as MMSegmentation describes,'
            notes[f'{run.task}: {action} {weights} to {place_of(str(weights))}'] = None
        table.add_row(
            run.name,
            f'{images:,}',
            f'{images // (each * args.gpus):,}',
            f'{cost.trained:,}',
            f'{cost.memory_gib:.1f}',
            f'{cost.gpu_hours:.2f}',
            'there' if data_there else 'missing',
            'none' if weights is None else 'there' if weights_there else 'missing',
        )
    console.print(table)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    console.print(
        f'GPU hours are of an A100, taken to reach {UTILISATION:.0%} of {A100_HALF:g} TFLOP/s in mixed precision and '
        f'of {A100_FLOAT:g} in float32. Validation and reading of images are not in them. Nothing was measured.',
        highlight=False,
    )


def prepare(runs: list[PaperRun], args: argparse.Namespace, console: Console) -> None:
    """Bring data and weights to their places."""
    for task in dict.fromkeys(run.task for run in runs):
        published = PUBLISHED[task]
        if not published.missing(args.data_root):
            pass
        elif task == 'nyu':
            published.require(args.archives)
            files = [str(args.archives / name) for name in published.names]
            convert_nyu.main([*files, '--out', str(args.data_root / published.folder)])
        else:
            published.unpack(args.data_root, args.archives)
        console.print(f'{task}: data in {args.data_root / published.folder}', highlight=False)
    for run in runs:
        fetch_weights(run, weights_of(config_of(run, args)[0]))


def launch(command: str, arguments: Sequence[str], gpus: int) -> None:
    """Train or test in processes of their own, one for each GPU.

    Raises:
        SystemExit: It failed.
    """
    start = [sys.executable]
    if gpus > 1:
        start += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={gpus}']
        arguments = [*arguments, '--launcher', 'pytorch']
    done = subprocess.run([*start, '-m', 'iconformer_mm', command, *arguments], check=False)
    if done.returncode:
        raise SystemExit(
            f'error: `iconformer {command} {shlex.join(arguments)}` failed with exit code {done.returncode}; what it '
            'said stands above. The same command goes on from the newest checkpoint'
        )


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint of the last step of a training.

    Raises:
        FileNotFoundError: There is none.
    """
    found = [
        (int(m[1]), path) for path in folder.glob('*.*') if (m := re.fullmatch(r'(?:epoch|iter)_(\d+)', path.stem))
    ]
    if not found:
        raise FileNotFoundError(f'the training in {folder} wrote no checkpoint')
    return max(found)[1]


def with_score(run: PaperRun, metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a test, in which the task's own is.

    Raises:
        ValueError: It is not.
    """
    metric = TASKS[run.task].metric
    if finds_nothing(metric, metrics):
        return {**metrics, metric: 0.0}
    if metric not in metrics:
        raise ValueError(f'the test of {run.name} gave no {metric}; it gave {", ".join(metrics)}')
    return metrics


def run_all(runs: list[PaperRun], args: argparse.Namespace, console: Console) -> None:
    """Train and test what is not finished. What is missing for any run is an error before the first."""
    left: list[tuple[PaperRun, str | None, dict[str, Any], dict[str, Any]]] = []
    for run in runs:
        cfg, options = config_of(run, args)
        settings = dict(config=f'{run.task}/{run.name}', gpus=args.gpus, options=options)
        settings = json.loads(json.dumps(settings, default=str))
        if _is_finished(run, settings, args):
            console.print(f'{run.name}: finished', highlight=False)
            continue
        if missing := PUBLISHED[run.task].missing(args.data_root):
            folder = args.data_root / PUBLISHED[run.task].folder
            raise DataError(
                f'{folder} lacks {", ".join(missing)}: download {" and ".join(PUBLISHED[run.task].files)} into '
                f'{args.archives} and run `iconformer paper prepare --tasks {run.task}`'
            )
        left.append((run, weights_of(cfg), options, settings))
    for run, weights, *_ in left:
        fetch_weights(run, weights)
    for run, _, options, settings in left:
        train_and_test(run, options, settings, args)


def _is_finished(run: PaperRun, settings: dict[str, Any], args: argparse.Namespace) -> bool:
    """Whether a run is finished.

    Raises:
        ValueError: It was finished or begun with other settings.
    """
    folder = run.result(args.out).with_suffix('')
    finished = run.read(args.out)
    if finished is not None and finished['settings'] != settings:
        raise ValueError(
            f'{run.result(args.out)} was finished with other settings; give another --out, or remove it and {folder}'
        )
    # A work folder goes on with the settings that it began with.
    begun = folder / BEGUN
    if finished is None and begun.is_file() and json.loads(begun.read_text(encoding='utf-8')) != settings:
        raise ValueError(f'{folder} was begun with other settings; remove it, or give another --out')
    return finished is not None


def train_and_test(run: PaperRun, options: dict[str, Any], settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Train, or go on with a training, then test, and write the result.

    Args:
        run: The run.
        options: What is set of its config.
        settings: The same and more as JSON keeps it, without tuples.
        args: The command line.

    Raises:
        SystemExit: One of them failed.
        ValueError: The test lacks the metric of the task.
    """
    folder = run.result(args.out).with_suffix('')
    write_json(folder / BEGUN, settings)
    given = [f'{name}={value}' for name, value in options.items()]
    common = ['--work-dir', str(folder), '--cfg-options', *given]
    launch('train', [str(run.config), '--resume', *common], args.gpus)
    metrics = folder / 'metrics.json'
    checkpoint = newest_checkpoint(folder)
    launch('test', [str(run.config), str(checkpoint), '--metrics', str(metrics), *common], args.gpus)
    content = with_score(run, json.loads(metrics.read_text(encoding='utf-8')))
    write_json(run.result(args.out), dict(settings=settings, checkpoint=checkpoint.name, metrics=content))
    os.remove(metrics)


def changes_of(run: PaperRun, settings: dict[str, Any]) -> list[str]:
    """What a finished run changed of the recipe. Paths and the number of GPUs do not count.

    Args:
        run: The run.
        settings: Of its result.
    """
    changed = {
        name: value for name, value in settings['options'].items() if not name.endswith(('.data_root', '.ann_file'))
    }
    if changed.get(BATCH, 0) * settings['gpus'] == batch_of(run, load_config(str(run.config))):
        del changed[BATCH]
    return [f'{name}={value}' for name, value in changed.items()]


def table(runs: list[PaperRun], args: argparse.Namespace, console: Console) -> None:
    """Print what was measured beside the paper's claim, and write it as Markdown. Changed recipes are marked."""
    head = ('task', 'model', 'metric', *args.methods, f'claim ({PAPER})')
    rows, notes = [], []
    for task, model in dict.fromkeys((run.task, run.model) for run in runs):
        scores = []
        for method in args.methods:
            run, about = PaperRun(task, model, method), TASKS[task]
            result = run.read(args.out)
            if result is None:
                scores.append('not run')
                continue
            changes = changes_of(run, result['settings'])
            if changes:
                notes.append(f'* {run.name} is not of the recipe: {" ".join(changes)}')
            scores.append(f'{about.factor * result["metrics"][about.metric]:.4g}{" *" if changes else ""}')
        rows.append((task, model, TASKS[task].metric, *scores, TASKS[task].claim))
    shown = Table()
    for column in head:
        shown.add_column(column, overflow='fold')
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with written_whole(args.out / 'table.md') as temporary:
        text = '\n'.join([to_markdown(head, rows), *(f'\\{note}\n' for note in notes)])
        temporary.write_text(text, encoding='utf-8')
    console.print(f'as Markdown: {args.out / "table.md"}', highlight=False, soft_wrap=True)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 180)
    stage = dict(plan=plan, prepare=prepare, run=run_all, table=table)[args.stage]
    stage(runs_of(args), args, console)
