"""Draw the figures of docs/method.md from the package's own modules.

python docs/figures/draw_method.py
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from unittest.mock import patch

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from mmengine.registry import init_default_scope
from mmpretrain.models import build_backbone
from mmpretrain.registry import DATASETS, MODELS
from rich.progress import track
from torch import Tensor, nn

from iconformer_mm import inject, remove
from iconformer_mm.engine import load_config
from iconformer_mm.files import written_whole

ROOT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'
FROZEN, TRAINED, DATA = '#e4e7eb', '#ffd9a8', '#ffffff'
BOTTLENECKS = (8, 16, 32, 64, 128)
PAPER = (1.6, 2.8)  # per cent of the backbone, from the paper's abstract
BACKBONES = {
    'Swin-L': dict(type='SwinTransformer', arch='large', img_size=224),
    'Swin-B': dict(type='SwinTransformer', arch='base', img_size=224),
    'ViT-B/16': dict(type='VisionTransformer', arch='base', img_size=224),
}


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with written_whole(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches='tight', facecolor='white')
    plt.close(figure)
    print(f'wrote {path}')


# The block and its adapter.


def read_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes within one adapted block of ViT-B/16 on two images of 224 x 224, as they pass."""
    arch = dict(embed_dims=768, num_layers=1, num_heads=12, feedforward_channels=3072)
    backbone = build_backbone(dict(type='VisionTransformer', arch=arch, img_size=224))
    inject(backbone, 'icon')
    adapter = backbone.layers[0].adapter_attention
    shapes: dict[str, tuple[int, ...]] = {}

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda module, inputs, out: shapes.update({name: tuple(out.shape)}))

    watch('norm', backbone.layers[0].ln1)
    watch('down', adapter.down)
    watch('generator', adapter.icon.generator)
    watch('kernels', adapter.icon)
    watch('up', adapter.up)
    adapter.icon.register_forward_pre_hook(lambda module, inputs: shapes.update(maps=tuple(inputs[0].shape)))
    with torch.no_grad():
        backbone(torch.zeros(2, 3, 224, 224))
    return shapes


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 2.3) -> None:
    """A box with text, centred."""
    height = 0.34 + 0.26 * text.count('\n') + 0.18
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle='round,pad=0.04', facecolor=colour, edgecolor='#444444'
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha='center', va='center', fontsize=9)


def arrow(axes: Axes, *points: tuple[float, float]) -> None:
    """A line through points with a head at its end."""
    for start, end in zip(points[:-2], points[1:-1]):
        axes.plot(*zip(start, end), color='#444444', linewidth=1.1, solid_capstyle='round', zorder=0)
    style = dict(arrowstyle='-|>', color='#444444', linewidth=1.1, shrinkA=0, shrinkB=0)
    axes.annotate('', xy=points[-1], xytext=points[-2], arrowprops=style, zorder=0)


def plus(axes: Axes, x: float, y: float) -> None:
    """A sum."""
    axes.text(
        x, y, '+', ha='center', va='center', fontsize=13, bbox=dict(boxstyle='circle,pad=0.15', facecolor='white')
    )


def draw_block() -> plt.Figure:
    """The block with its adapter, and the shapes that pass."""
    shapes = {name: ' x '.join(map(str, shape)) for name, shape in read_shapes().items()}
    figure, axes = plt.subplots(figsize=(9.2, 8.2))
    left, middle, right = 1.6, 5.0, 8.3
    box(axes, left, 0.3, f'tokens x\n{shapes["norm"]}', DATA)
    box(axes, left, 1.5, 'LayerNorm', FROZEN)
    box(axes, left, 4.3, 'attention', FROZEN)
    plus(axes, left, 7.3)
    box(axes, left, 8.3, 'LayerNorm', FROZEN)
    box(axes, left, 9.3, 'FFN', FROZEN)
    plus(axes, left, 10.3)
    arrow(axes, (left, 0.65), (left, 1.24))
    arrow(axes, (left, 1.76), (left, 4.04))
    arrow(axes, (left, 4.56), (left, 7.08))
    arrow(axes, (left, 7.52), (left, 8.04))
    arrow(axes, (left, 8.56), (left, 9.04))
    arrow(axes, (left, 9.56), (left, 10.08))
    arrow(axes, (left, 10.52), (left, 11.2))
    arrow(axes, (left, 0.9), (0.1, 0.9), (0.1, 7.3), (left - 0.22, 7.3))
    arrow(axes, (left, 7.8), (0.1, 7.8), (0.1, 10.3), (left - 0.22, 10.3))

    box(axes, middle, 2.4, f'down\n{shapes["down"]}', TRAINED)
    box(axes, middle, 4.6, f'depth-wise convolution\nof the patches, {shapes["maps"]}', TRAINED, width=3.1)
    box(axes, middle, 5.6, 'activation', TRAINED)
    box(axes, middle, 6.5, f'up\n{shapes["up"]}', TRAINED)
    arrow(axes, (left, 2.4), (middle - 1.2, 2.4))
    axes.text((left + middle) / 2 - 0.4, 2.52, 'u = LN(x)', fontsize=9, ha='center')
    arrow(axes, (middle, 2.8), (middle, 4.2))
    arrow(axes, (middle, 5.0), (middle, 5.34))
    arrow(axes, (middle, 5.86), (middle, 6.1))
    arrow(axes, (middle, 6.9), (middle, 7.3), (left + 0.22, 7.3))
    axes.text((left + middle) / 2 + 0.2, 7.4, 's A(u)', fontsize=9, ha='center')

    box(axes, right, 2.4, 'mean over the map', TRAINED)
    box(axes, right, 3.4, f'linear\n{shapes["generator"]}', TRAINED)
    box(axes, right, 4.6, f'FilterNorm\nk: {shapes["kernels"]}', TRAINED)
    arrow(axes, (middle + 1.2, 2.4), (right - 1.2, 2.4))
    arrow(axes, (right, 2.66), (right, 3.0))
    arrow(axes, (right, 3.8), (right, 4.2))
    arrow(axes, (right - 1.2, 4.6), (middle + 1.62, 4.6))
    for y, colour, text in ((9.9, FROZEN, 'pre-trained and frozen'), (9.2, TRAINED, 'trained: the adapter A')):
        box(axes, 6.2, y, '', colour, width=0.5)
        axes.text(6.7, y, text, fontsize=9, va='center')
    axes.set(xlim=(-0.1, 9.7), ylim=(-0.2, 11.3))
    axes.axis('off')
    return figure


# Kernels.


def train_on_digits(steps: int) -> tuple[nn.Module, Tensor, Tensor]:
    """An adapted quickstart model after some steps on the digits, with test images (N, 1, 28, 28) and labels."""
    torch.manual_seed(0)
    cfg = load_config(str(QUICKSTART))
    model = MODELS.build({**cfg.model, 'data_preprocessor': None})
    model.init_weights()
    inject(model, 'icon', bottleneck=16)
    parts = {}
    for part in ('train', 'test'):
        items = [*DATASETS.build(cfg[f'{part}_dataloader'].dataset)]
        images = torch.stack([item['inputs'] for item in items]).float().sub(40).div(80)
        parts[part] = images, torch.cat([item['data_samples'].gt_label for item in items])
    images, labels = parts['train']
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    model.train()
    for _ in track(range(steps), 'training'):
        batch = torch.randperm(len(images))[:50]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval(), *parts['test']


def draw_kernels(steps: int, channels: int = 5) -> plt.Figure:
    """Kernels of the last block for two digits, before and after FilterNorm."""
    model, images, labels = train_on_digits(steps)
    chosen = [int((labels == digit).nonzero()[0]) for digit in (0, 1)]
    icon = model.backbone.layers[-1].adapter_attention.icon
    seen: dict[str, Tensor] = {}
    icon.generator.register_forward_hook(lambda module, inputs, out: seen.update(raw=out))
    icon.register_forward_hook(lambda module, inputs, out: seen.update(kernels=out))
    with torch.no_grad():
        model(images[chosen])
    kernels = seen['kernels']
    raw = seen['raw'].view_as(kernels)
    moved = (kernels[0] - kernels[1]).abs().sum(dim=(1, 2)).topk(channels).indices

    figure, grid = plt.subplots(2, 1 + 2 * channels, figsize=(11, 2.9), constrained_layout=True)
    for row, axes in enumerate(grid):
        axes[0].imshow(images[chosen[row], 0], cmap='gray')
        axes[0].set_title('input' if row == 0 else '', fontsize=9)
        for stage, (title, values) in enumerate((('generated', raw), ('after FilterNorm', kernels))):
            limit = float(values[:, moved].abs().max())
            for column, channel in enumerate(moved.tolist()):
                place = axes[1 + stage * channels + column]
                last = place.imshow(values[row, channel], cmap='RdBu_r', vmin=-limit, vmax=limit)
                if row == 0:
                    place.set_title(f'{title}\nchannel {channel}' if column == 0 else f'\n{channel}', fontsize=8)
            if row == 1:
                side = grid[:, 1 + stage * channels : 1 + (stage + 1) * channels].ravel().tolist()
                bar = figure.colorbar(last, ax=side, location='bottom', shrink=0.5, aspect=40)
                bar.ax.tick_params(labelsize=7)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure


# Parameters.


def shares(config: dict) -> list[float]:
    """The adapters' share of a backbone's parameters in per cent, for each bottleneck; weights take no memory."""
    on_cpu = functools.partial(torch.linspace, device='cpu')  # read while building: rates of drop path
    found = []
    with torch.device('meta'), patch('torch.linspace', on_cpu):
        backbone = build_backbone(config)
        for bottleneck in BOTTLENECKS:
            found.append(100 * inject(backbone, 'icon', bottleneck=bottleneck).backbone_share)
            remove(backbone)
    return found


def draw_shares() -> plt.Figure:
    """Share of trained parameters against the bottleneck."""
    figure, axes = plt.subplots(figsize=(6.4, 4), constrained_layout=True)
    axes.axhspan(*PAPER, color='#e4e7eb', label='range in the paper’s abstract')
    for (name, config), marker in zip(track(BACKBONES.items(), 'counting'), 'osD'):
        found = shares(config)
        axes.plot(BOTTLENECKS, found, marker=marker, markersize=5, label=name)
        print(f'{name}: ' + ', '.join(f'{c}: {share:.3f} %' for c, share in zip(BOTTLENECKS, found)))
    axes.set(xscale='log', yscale='log', xlabel='bottleneck c', ylabel='trained share of the backbone (%)')
    axes.set_xticks(BOTTLENECKS, map(str, BOTTLENECKS))
    axes.set_yticks([0.2, 0.5, 1, 2, 5], ['0.2', '0.5', '1', '2', '5'])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'images', help='folder for the figures')
    parser.add_argument('--figures', nargs='+', choices=['block', 'kernels', 'shares'], help='which (default: all)')
    parser.add_argument('--steps', type=int, default=1, help='training steps before kernels are drawn (1)')
    args = parser.parse_args()
    init_default_scope('mmpretrain')
    chosen = args.figures or ('block', 'kernels', 'shares')
    if 'block' in chosen:
        save(draw_block(), args.out / 'method_block.png')
    if 'kernels' in chosen:
        save(draw_kernels(args.steps), args.out / 'method_kernels.png')
    if 'shares' in chosen:
        save(draw_shares(), args.out / 'method_shares.png')


if __name__ == '__main__':
    main()
