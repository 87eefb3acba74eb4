"""Predict on images with an adapter, and draw what comes out.

python tools/predict.py IMAGES [IMAGES ...] --config CONFIG --adapter adapter.safetensors --out DIR
"""

from __future__ import annotations

import argparse
import glob
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iconformer_mm.files import expanded, write_json
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.inference.predictions import SCORE_THRESHOLD, describe_prediction, draw_prediction, write_maps
from iconformer_mm.messages import one_line

from .errors import user_errors
from .parser import TRUST, Parser, guard

SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'}


def find_images(names: Iterable[str]) -> list[Path]:
    """The image files that names stand for: files, folders (with all below them) and patterns.

    Raises:
        SystemExit: A name stands for nothing.
    """
    found: dict[Path, None] = {}  # in order, each once
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob('*') if p.suffix.lower() in SUFFIXES and p.is_file())
        else:
            files = [path] if path.is_file() else sorted(map(Path, glob.glob(name, recursive=True)))
        if not files:
            raise SystemExit(f"'{name}' is no image, no folder with images and no pattern that matches any")
        found.update(dict.fromkeys(p for p in files if p.is_file()))
    return list(found)


def output_names(images: list[Path]) -> list[Path]:
    """Names for what is written, one an image: those of the files, with their folders where names recur."""
    stems = [Path(image.stem) for image in images]
    if len(set(stems)) == len(stems):
        return stems
    paths = [image.resolve() for image in images]
    common = Path(*[parts[0] for parts in zip(*(p.parts[:-1] for p in paths)) if len(set(parts)) == 1])
    # With the suffix: a.png and a.jpg of one folder are two.
    return [path.relative_to(common) for path in paths]


def read_image(path: Path, console: Console, skipped: list[str]) -> np.ndarray | None:
    """An image (H, W, 3), BGR; if it cannot be read, None, which is said and noted."""
    try:
        image = cv2.imread(str(path))
    except cv2.error:  # more pixels than OpenCV takes
        image = None
    if image is None:
        skip(path, 'is no image that can be read', console, skipped)
    return image


def skip(path: Path, reason: str, console: Console, skipped: list[str]) -> None:
    """Note an image that is left out, and say why."""
    skipped.append(str(path))
    console.print(one_line(f'skipped: {path} {reason}'), style='yellow', soft_wrap=True, markup=False)


def check_finite(content: Any) -> None:
    """See that all numbers of a prediction are finite.

    Raises:
        ValueError: One is not.
    """
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for part in content:
            check_finite(part)
    elif isinstance(content, float) and not math.isfinite(content):
        raise ValueError('the prediction holds numbers that are not finite')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.partition('\n')[0])
    parser.add_argument('images', nargs='+', help='image files, folders or patterns')
    parser.add_argument('--config', required=True, help='config of the model: path or library::path')
    parser.add_argument('--adapter', help='adapter file; without it the model is as --base has it')
    parser.add_argument('--base', help="checkpoint with the base weights (default: the config's pre-trained ones)")
    parser.add_argument('--out', type=expanded, required=True, help='folder for pictures and predictions.json')
    parser.add_argument(
        TRUST, action='store_true', help='unpickle the base (.pth) even if that could execute code in it'
    )
    parser.add_argument('--device', help='where to run (default: the best there is)')
    parser.add_argument(
        '--score', type=float, default=SCORE_THRESHOLD, help=f'smallest score of instances ({SCORE_THRESHOLD})'
    )
    return parser.parse_args(argv)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the status is 1 if an image was skipped."""
    args = parse_args(argv)
    console = Console(stderr=True)
    guard(args)
    images = find_images(args.images)
    inferencer = AdapterInferencer(args.config, args.adapter, args.base, args.device, args.trust_checkpoints)
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    skipped: list[str] = []
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for path, name in zip(progress.track(images, description='predicting'), output_names(images)):
            image = read_image(path, console, skipped)
            if image is None:
                continue
            target = args.out / name
            try:
                (prediction,) = inferencer([image])
                prediction = prediction.cpu()
                described = describe_prediction(prediction, inferencer.classes, args.score)
                check_finite(described)
                draw_prediction(image[..., ::-1].copy(), prediction, f'{target}.png', inferencer.meta, args.score)
                write_maps(prediction, target)
            except Exception as error:  # of any library; the other images are not to suffer from it
                height, width = image.shape[:2]
                reason = f'({height} x {width}) cannot be taken by the model ({type(error).__name__}: {error})'
                skip(path, reason, console, skipped)
                for left in (f'{target}.png', f'{target}_labels.png', f'{target}_depth.npy'):
                    Path(left).unlink(missing_ok=True)
                continue
            results[str(path)] = described
    write_json(args.out / 'predictions.json', dict(predictions=results, skipped=skipped))
    console.print(f'{len(results)} predictions in {args.out}, {len(skipped)} images skipped', soft_wrap=True)
    sys.exit(1 if skipped else 0)
