"""Adapt a real DINOv2-S to 20 images a class by four methods, compare them, and draw predictions.

bash tools/quickstart.sh --real [--data FOLDER]

FOLDER has one folder of images for each class. Without it, Fashion-MNIST is taken.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from mmengine.registry import init_default_scope
from rich.console import Console

from iconformer_mm import inject
from iconformer_mm.checkpoint.real_base import SOURCE, cache_folder, fetch_base
from iconformer_mm.cli import report as report_page
from iconformer_mm.cli.errors import user_errors
from iconformer_mm.comparison.experiments import ROOT, Run, execute_all, make_parser, print_table, to_markdown
from iconformer_mm.comparison.plots import plot_comparison
from iconformer_mm.datasets.few_shot import split_folder, write_fashion_mnist
from iconformer_mm.engine import load_config
from iconformer_mm.figures import new_figure
from iconformer_mm.inference import AdapterInferencer

CONFIG = ROOT / 'configs' / 'quickstart' / 'real' / 'dinov2-small_linear_images.py'
DEBIAN = Path('/usr/share/datasets/fashion-mnist')
# Name, what is trained, learning rate. The methods train the last four blocks, so that the others need no gradients.
LAST = '[8,9,10,11]'
METHODS = {
    'frozen': ('linear probing', {}, 1e-3),
    'adaptformer': ('AdaptFormer', dict(blocks=LAST), 1e-3),
    'icon': ('iCoN', dict(blocks=LAST), 1e-3),
    'full': ('full fine-tuning', {}, 5e-5),
}
TITLES = [('method',), ('trained', 'params'), ('accuracy', '(%)'), ('seconds',), ('adapter', '(KiB)')]


@dataclass
class Result:
    """One row of the table."""

    method: str
    trained_parameters: int
    accuracies: list[float]
    seconds: float
    adapter_bytes: int | None


def accuracy(run: Run) -> float:
    """Accuracy in percent after training."""
    return run.scalars()[-1]['accuracy/top1']


def make_images(args: argparse.Namespace) -> tuple[Path, list[str], str]:
    """Folder of the images, classes, and what they are."""
    target = args.out / 'data'
    if args.data is not None:
        return target, split_folder(args.data, target, args.shots), str(args.data)
    source = DEBIAN if DEBIAN.is_dir() else cache_folder() / 'FashionMNIST' / 'raw'
    if not source.is_dir():
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(str(cache_folder()), download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f'Fashion-MNIST cannot be downloaded ({error}). Give your own images as --data FOLDER, or put the '
                f'four idx.gz files into {source} (Debian has them in the package dataset-fashion-mnist)'
            ) from None
    return target, write_fashion_mnist(source, target, args.shots), 'Fashion-MNIST'


def make_runs(args: argparse.Namespace, base: Path, data: Path, classes: list[str]) -> dict[str, list[Run]]:
    """The runs of each method."""
    runs = {}
    for method, (_, selection, rate) in METHODS.items():
        hook = f"dict(type='PEFTHook',method=dict(type='{method}'))"
        options = [
            f'model.backbone.init_cfg.checkpoint={base}',
            f'model.head.num_classes={len(classes)}',
            f'optim_wrapper.optimizer.lr={rate}',
            *(f'{name}_dataloader.dataset.data_root={data}' for name in ('train', 'val', 'test')),
            *args.cfg_options,
        ]
        config = args.out / f'{method}.py'
        lines = [f"_base_ = ['{CONFIG}']", f'custom_hooks = [{hook}]']
        if selection:
            lines[1] = f"custom_hooks = [dict(type='PEFTHook', method=dict(type='{method}'), blocks={LAST})]"
        config.write_text('\n'.join(lines) + '\n', encoding='utf-8')
        runs[method] = [
            Run(config, args.out / f'{method}_seed{seed}', (f'randomness.seed={seed}', *options))
            for seed in range(args.seeds)
        ]
    return runs


def collect(method: str, runs: list[Run]) -> Result:
    """Read the runs of a method."""
    cfg = load_config(str(next(runs[0].folder.glob('*.py'))))
    init_default_scope(cfg.default_scope)
    from mmpretrain.registry import MODELS

    hook = dict(cfg.custom_hooks[0])
    hook.pop('type')
    summary = inject(MODELS.build(cfg.model), hook.pop('method'), **hook)
    adapter = runs[0].folder / 'adapter.safetensors'
    return Result(
        method=METHODS[method][0],
        trained_parameters=summary.trainable,
        accuracies=[accuracy(run) for run in runs],
        seconds=statistics.mean(run.train_seconds() for run in runs),
        adapter_bytes=adapter.stat().st_size if adapter.exists() else None,
    )


def rows_of(results: list[Result]) -> list[list[str]]:
    """The cells of the table."""
    rows = []
    for r in results:
        spread = f' ± {statistics.stdev(r.accuracies):.1f}' if len(r.accuracies) > 1 else ''
        size = f'{r.adapter_bytes / 2**10:,.0f}' if r.adapter_bytes else '-'
        score = f'{statistics.mean(r.accuracies):.1f}{spread}'
        rows.append([r.method, f'{r.trained_parameters:,}', score, f'{r.seconds:.0f}', size])
    return rows


def draw_predictions(run: Run, data: Path, classes: list[str], path: Path, number: int = 24) -> None:
    """Draw test images with what the adapted model says of them; what is wrong in red."""
    cfg = load_config(str(next(run.folder.glob('*.py'))))
    inferencer = AdapterInferencer(cfg, adapter=run.folder / 'adapter.safetensors', device='cpu')
    images = sorted((data / 'test').glob('*/*'))
    chosen = [images[i] for i in np.linspace(0, len(images) - 1, min(number, len(images))).round().astype(int)]
    labels = [classes[int(result.pred_label)] for result in inferencer([str(p) for p in chosen])]
    columns = 8
    figure = new_figure(1.5 * columns, 1.8 * -(-len(chosen) // columns))
    axes = figure.subplots(-(-len(chosen) // columns), columns, squeeze=False).ravel()
    from PIL import Image

    for ax in axes:
        ax.axis('off')
    for ax, image, label in zip(axes, chosen, labels):
        right = label == image.parent.name
        ax.imshow(np.asarray(Image.open(image).convert('RGB')))
        title = label if right else f'{label}\nnot {image.parent.name}'
        ax.set_title(title, fontsize=8, color='black' if right else 'crimson')
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(results: list[Result], what: str, args: argparse.Namespace, console: Console) -> None:
    """Print the table, and write it with the plot."""
    title = f'DINOv2-S adapted to {what}, {args.shots} images a class, {args.seeds} seed{"s" * (args.seeds > 1)}'
    print_table(title, TITLES, rows_of(results), console)
    text = to_markdown([' '.join(words) for words in TITLES], rows_of(results))
    (args.out / 'results.md').write_text(text, encoding='utf-8')
    (args.out / 'results.json').write_text(json.dumps([asdict(r) for r in results], indent=2) + '\n', encoding='utf-8')
    plot_comparison(
        [r.method for r in results],
        [r.trained_parameters for r in results],
        [statistics.mean(r.accuracies) for r in results],
        [statistics.stdev(r.accuracies) if len(r.accuracies) > 1 else 0.0 for r in results],
        args.out / 'accuracy.png',
        title=title,
    )


@user_errors
def main() -> None:
    """Run the tool."""
    parser = make_parser(__doc__.partition('\n')[0], 'work_dirs/quickstart_real')
    parser.add_argument('--data', type=Path, help='folder with one folder of images a class (default: Fashion-MNIST)')
    parser.add_argument('--shots', type=int, default=20, help='training images a class (20)')
    parser.add_argument('--seeds', type=int, default=1, help='runs of each method (1)')
    parser.add_argument('--cfg-options', nargs='*', default=[], help='settings for every run, as in train.py')
    args = parser.parse_args()
    console, start = Console(), time.time()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    base = fetch_base('mmpretrain')
    console.print(f'base: {SOURCE}')
    data, classes, what = make_images(args)
    runs = make_runs(args, base, data, classes)
    slowest_first = [run for method in reversed(METHODS) for run in runs[method]]
    execute_all(slowest_first, args.jobs, console, lambda run: f'{run.folder.name}: {accuracy(run):.1f} %')
    write([collect(m, runs[m]) for m in METHODS], what, args, console)
    draw_predictions(runs['icon'][0], data, classes, args.out / 'predictions.png')
    report_page.main([str(runs['icon'][0].folder), '--out', str(args.out / 'report.html')])
    for name in ('results.md', 'results.json', 'accuracy.png', 'predictions.png', 'report.html'):
        console.print(f'wrote {args.out / name}')
    console.print(f'{time.time() - start:.0f} s in all')


if __name__ == '__main__':
    main()
