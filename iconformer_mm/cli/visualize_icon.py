"""Show whether input conditioning does anything: iCoN's kernels for given images, and where the model looks.

python tools/visualize_icon.py IMAGES [IMAGES ...] --config CONFIG --adapter adapter.safetensors --out DIR
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from iconformer_mm.analysis import kernel_plots as pictures
from iconformer_mm.analysis.kernel_probe import (
    AdapterTrace,
    icon_adapters,
    look_at_adapters,
)
from iconformer_mm.analysis.saliency import attention_map, find_block, grad_cam
from iconformer_mm.analysis.statistics import compare_images, describe_layers
from iconformer_mm.checkpoint.reading import guard_loading
from iconformer_mm.extras import require_extra
from iconformer_mm.files import write_json
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.inference.image_files import UNREADABLE, read_image
from iconformer_mm.tuning import get_injection

from .errors import user_errors
from .parser import Parser
from .predict import find_images, output_names, say_skipped

OTHER = 'compare'
LAYERS_OF_FEATURES = 6


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.partition('\n')[0])
    parser.add_argument('images', nargs='+', help='image files, folders or patterns')
    parser.add_argument('--config', required=True, help='config of the model: path or library::path')
    parser.add_argument('--adapter', required=True, help='adapter file, of icon or icon-static')
    parser.add_argument('--base', help="checkpoint with the base weights (default: the config's pre-trained ones)")
    parser.add_argument('--compare', help='adapter file of another method, to see where its model looks')
    parser.add_argument('--out', type=Path, required=True, help='folder for pictures and kernels.json')
    parser.add_argument('--block', help='name of the block for Grad-CAM and attention (default: the last one)')
    parser.add_argument('--show', type=int, default=8, help='images drawn at most where each has a row (8)')
    parser.add_argument('--channels', type=int, default=8, help='channels drawn at most (8)')
    parser.add_argument('--device', help='where to run (default: the best there is)')
    args = parser.parse_args(argv)
    if min(args.show, args.channels) < 1:
        parser.error('--show and --channels must be at least 1')
    return args


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names of adapters without what all of them have in common, if they stay different."""
    short = {name: name.rpartition('.adapter')[0] for name in names}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def methods_of(inferencer: AdapterInferencer) -> dict[str, str]:
    """The methods of the adapters by their names."""
    injection = get_injection(inferencer.model)
    return {} if injection is None else {name: adapter.method.name for name, adapter in injection.adapters.items()}


def method_names(inferencer: AdapterInferencer) -> dict[str, str]:
    """Titles of the adapters: their methods, numbered if they are the same."""
    titles = methods_of(inferencer)
    if len(set(titles.values())) == len(titles):
        return titles
    return {name: f'{title} ({number})' for number, (name, title) in enumerate(titles.items(), 1)}


def draw_kernels(
    args: argparse.Namespace,
    kernels: dict[str, np.ndarray],
    titles: dict[str, str],
    images: list,
    names: list[str],
    console: Console,
) -> None:
    """The kernels of each layer for some of the images."""
    rows = pictures.spread_out(len(images), args.show)
    some = [images[i] for i in rows], [names[i] for i in rows]
    for name in track(list(kernels), description='drawing kernels', console=console):
        path = args.out / 'kernels' / f'{name}.png'
        pictures.plot_kernels(kernels[name][rows], *some, path, title=titles[name], channels=args.channels)


def draw_differences(args: argparse.Namespace, compared: dict[str, Any], titles: dict[str, str], images: list) -> None:
    """How the kernels of all images differ."""
    distances = {titles[name]: matrix for name, matrix in compared['distances'].items()}
    pictures.plot_distances(distances, args.out / 'distances.png')
    pictures.plot_shares({titles[n]: share for n, share in compared['shares'].items()}, args.out / 'shares.png')
    title = "principal components of the images' kernels, all layers"
    path = args.out / 'components.png'
    pictures.plot_components(compared['points'], compared['explained'], images, path, title)


def draw_features(
    args: argparse.Namespace,
    looks: list[dict[str, AdapterTrace]],
    titles: dict[str, str],
    images: list,
    names: list[str],
    console: Console,
) -> None:
    """The maps before and behind the filter, of some layers for some of the images."""
    layers = [list(titles)[i] for i in pictures.spread_out(len(titles), LAYERS_OF_FEATURES)]
    some = pictures.spread_out(len(images), args.show)
    for index in track(some, description='drawing features', console=console):
        rows = [pictures.FilteredMaps(titles[n], looks[index][n].before, looks[index][n].after) for n in layers]
        path = args.out / 'features' / f'{names[index]}.png'
        pictures.plot_filtered_maps(rows, images[index], path, channels=min(args.channels, 4))


def draw_saliency(
    args: argparse.Namespace, inferencer: AdapterInferencer, images: list, names: list[str], console: Console
) -> None:
    """Grad-CAM and attention of all models for some of the images."""
    rows = pictures.spread_out(len(images), args.show)
    columns, maps = [], []
    for adapter, title in method_names(inferencer).items():
        inferencer.set_adapter(adapter)
        for kind, function in (('Grad-CAM', grad_cam), ('attention', attention_map)):
            found = [
                function(inferencer, images[i][..., ::-1].copy(), args.block)
                for i in track(rows, description=f'{title}: {kind}', console=console)
            ]
            if kind == 'attention' and all(each is None for each in found):
                block = find_block(inferencer.model, args.block)
                reason = 'its attention is not one of all tokens to all (windows, or reduced keys)'
                console.print(f'no picture of attention in {block.name} ({block.family.name}): {reason}')
                continue
            columns.append(f'{title}\n{kind}')
            maps.append(found)
    drawn = [pictures.SaliencyRow(names[i], images[i], each) for i, each in zip(rows, zip(*maps))]
    pictures.plot_saliency(drawn, columns, args.out / 'saliency.png')


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the status is 1 if an image was skipped."""
    args = parse_args(argv)
    require_extra('analysis', 'looking at kernels')
    console = Console(stderr=True, soft_wrap=True)
    guard_loading()
    paths = find_images(args.images)
    adapters = {'default': args.adapter, **({OTHER: args.compare} if args.compare else {})}
    inferencer = AdapterInferencer(args.config, adapters, args.base, args.device)
    static = all(adapter.icon.kernel == 'static' for adapter in icon_adapters(inferencer.model).values())
    block = find_block(inferencer.model, args.block).name
    args.out.mkdir(parents=True, exist_ok=True)

    images: list[np.ndarray] = []
    names: list[str] = []
    looks: list[dict[str, AdapterTrace]] = []
    skipped: list[str] = []
    for path, name in zip(track(paths, description='looking at kernels', console=console), output_names(paths)):
        image = read_image(path)
        if image is None:
            skipped.append(str(path))
            say_skipped(path, UNREADABLE, console)
            continue
        try:
            look = look_at_adapters(inferencer, image)
        except Exception as error:  # of any library; the other images are not to suffer from it
            height, width = image.shape[:2]
            reason = f'({height} x {width}) cannot be taken by the model ({type(error).__name__}: {error})'
            skipped.append(str(path))
            say_skipped(path, reason, console)
            continue
        images.append(image[..., ::-1].copy())
        names.append(str(name))
        looks.append(look)
    if not images:
        raise SystemExit('error: none of the images can be read')
    titles = short_names(list(looks[0]))
    kernels = {name: np.stack([look[name].kernels for look in looks]) for name in titles}
    if static:
        console.print('the kernels are static: learned, and the same for all images')
    compared = None
    if len(images) > 1:
        compared = compare_images(kernels)
        draw_differences(args, compared, titles, images)
    else:
        console.print('one image: there is nothing to compare its kernels with')
    draw_kernels(args, kernels, titles, images, names, console)
    draw_features(args, looks, titles, images, names, console)
    draw_saliency(args, inferencer, images, names, console)
    content = dict(
        adapter=args.adapter,
        method=methods_of(inferencer)['default'],
        static=static,
        images=[str(path) for path in paths if str(path) not in skipped],
        layers=describe_layers(kernels, compared),
        explained_variance=compared and compared['explained'],
        block=block,
        skipped=skipped,
    )
    write_json(args.out / 'kernels.json', content)
    console.print(f'kernels of {len(images)} images in {args.out}, {len(skipped)} images skipped')
    raise SystemExit(1 if skipped else 0)
