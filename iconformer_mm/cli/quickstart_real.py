"""Adapt a real DINOv2-S to a few images of each class by four methods, compare them, and draw predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml  # type: ignore[import-untyped]
from PIL import Image

from iconformer_mm.checkpoint.real_base import SOURCE, fetch_base
from iconformer_mm.comparison.spec import ROOT
from iconformer_mm.datasets.few_shot import find_fashion_mnist, find_textile, split_folder, write_fashion_mnist
from iconformer_mm.engine import add_peft, load_config
from iconformer_mm.fetching import cache_folder
from iconformer_mm.figures import new_figure, save_figure
from iconformer_mm.files import expanded, written_whole
from iconformer_mm.inference import AdapterInferencer

from . import compare, report
from .errors import user_errors
from .parser import Parser

CONFIG = ROOT / 'configs' / 'quickstart' / 'real' / 'dinov2-small_linear_images.py'
# Adapters in the last four blocks: the other eight need no gradients.
BLOCKS = [8, 9, 10, 11]
CONFIG_FILE = 'config.py'


def make_images(data: str, target: Path, shots: int | None) -> tuple[list[str], str]:
    """Write the training and test images, one folder per class.

    Args:
        data: The user's folder of images, one sub-folder per class; ``'fashion-mnist'``; or ``'textile'``, for
            defects in textiles.
        target: Where ``train/CLASS`` and ``test/CLASS`` are written.
        shots: Training images per class; None for 20, or fewer where a class has fewer than 25.

    Returns:
        The names of the classes, and what the images are.

    Raises:
        DataError: The folder does not fit.
        FetchError: The images cannot be fetched.
    """
    if data == 'fashion-mnist':
        return write_fashion_mnist(find_fashion_mnist(cache_folder()), target, shots or 20), 'Fashion-MNIST'
    if data == 'textile':
        return split_folder(find_textile(cache_folder()), target, shots), 'textile defects'
    return split_folder(Path(expanded(data)), target, shots), data


def settings_of(base: Path, data: Path, classes: Sequence[str], size: int = 84) -> dict[str, Any]:
    """The settings that every run has beyond the config's."""
    settings: dict[str, Any] = {
        'model.backbone.init_cfg.checkpoint': str(base),
        'model.head.num_classes': len(classes),
    }
    for part in ('train', 'val', 'test'):
        settings[f'{part}_dataloader.dataset.data_root'] = str(data)
        settings[f'{part}_dataloader.dataset.pipeline.1.scale'] = [size, size]
    return settings


def write_comparison(path: Path, title: str, base: Path, options: dict[str, Any], seeds: int) -> None:
    """Write the comparison as a YAML file that :mod:`iconformer_mm.cli.compare` reads."""
    blocks = {'default_hooks.peft.blocks': BLOCKS}
    content = dict(
        title=title,
        seeds=list(range(seeds)),
        search_seed=100,
        tasks=dict(
            images=dict(
                config=str(CONFIG),
                base=str(base),
                metric='accuracy/top1',
                title='accuracy (%)',
                learning_rates=[1e-3],
                options=options,
            )
        ),
        methods=dict(
            frozen=dict(title='linear probing', method=dict(type='frozen')),
            adaptformer=dict(title='AdaptFormer', method=dict(type='adaptformer'), options=blocks),
            icon=dict(title='iCoN', method=dict(type='icon'), options=blocks),
            full=dict(title='full fine-tuning', method=dict(type='full'), learning_rates=dict(images=[5e-5])),
        ),
    )
    with written_whole(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding='utf-8')


def write_config(out: Path, options: dict[str, Any]) -> None:
    """Write the config of the adapted model, for `iconformer predict`."""
    cfg = load_config(str(CONFIG))
    cfg.merge_from_dict(options)
    with written_whole(out / CONFIG_FILE) as temporary:
        temporary.write_text(cfg.pretty_text, encoding='utf-8')


def draw_predictions(adapter: Path, options: dict[str, Any], classes: Sequence[str], path: Path) -> None:
    """Draw 24 test images with their predicted classes, wrong ones in red."""
    cfg = load_config(str(CONFIG))
    add_peft(cfg, 'icon')
    cfg.merge_from_dict({**options, 'default_hooks.peft.blocks': BLOCKS})
    inferencer = AdapterInferencer(cfg, adapter=adapter, device='cpu')
    images = sorted(Path(options['test_dataloader.dataset.data_root'], 'test').glob('*/*'))
    chosen = [images[i] for i in np.linspace(0, len(images) - 1, min(24, len(images))).round().astype(int)]
    labels = [classes[int(result.pred_label)] for result in inferencer([str(image) for image in chosen])]
    columns = 8
    rows = -(-len(chosen) // columns)
    figure = new_figure(1.5 * columns, 1.8 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis('off')
    for axes, image, label in zip(grid, chosen, labels):
        axes.imshow(np.asarray(Image.open(image).convert('RGB')))
        right = label == image.parent.name
        axes.set_title(label if right else f'{label}\nnot {image.parent.name}', fontsize=8, color='k' if right else 'r')
    save_figure(figure, path, dpi=120)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        '--data',
        default='fashion-mnist',
        help='folder of images, one sub-folder per class; or fashion-mnist or textile, to be fetched (fashion-mnist)',
    )
    parser.add_argument(
        '--size',
        type=int,
        default=84,
        help='side of the images, a multiple of 14 pixels (84); fine detail needs more',
    )
    parser.add_argument(
        '--shots', type=int, help='training images per class (20, or four of five where a class has fewer than 25)'
    )
    parser.add_argument('--seeds', type=int, default=1, help='runs of each method (1)')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, one core each (2)')
    parser.add_argument('--out', type=expanded, default='work_dirs/quickstart_real', help='folder for all results')
    args = parser.parse_args(argv)
    for name in ('shots', 'seeds', 'jobs'):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f'--{name} must be at least 1, got {getattr(args, name)}')
    if args.size < 28 or args.size % 14:
        parser.error(f'--size must be a multiple of 14, from 28 on, got {args.size}')
    out = Path(args.out).resolve()
    base = fetch_base('mmpretrain')
    print(f'base: {SOURCE}')
    classes, what = make_images(args.data, out / 'data', args.shots)
    options = settings_of(base, out / 'data', classes, args.size)
    shots = args.shots or min(len(list((out / 'data' / 'train' / name).iterdir())) for name in classes)
    title = f'DINOv2-S adapted to {what}, {shots} images per class'
    write_comparison(out / 'comparison.yaml', title, base, options, args.seeds)
    compare.main([str(out / 'comparison.yaml'), '--out', str(out), '--jobs', str(args.jobs)])
    draw_predictions(out / 'runs' / 'images' / 'icon' / 'seed0.safetensors', options, classes, out / 'predictions.png')
    report.main([str(out), '--out', str(out / 'report.html')])
    write_config(out, options)
    print(f'wrote predictions.png and report.html to {out}')
    print('to predict with iCoN:')
    adapter = out / 'runs' / 'images' / 'icon' / 'seed0.safetensors'
    print(f'  iconformer predict IMAGES --config {out / CONFIG_FILE} --adapter {adapter} --out predictions')
