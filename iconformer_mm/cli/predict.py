"""Predict on images with an adapter, and draw what comes out.

python tools/predict.py IMAGES [IMAGES ...] --config CONFIG --adapter adapter.safetensors --out DIR
"""

from __future__ import annotations

import argparse
import glob
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iconformer_mm.engine import load_config
from iconformer_mm.extras import require_extra
from iconformer_mm.files import expanded, write_json
from iconformer_mm.inference.image_files import FilePredictor
from iconformer_mm.inference.journal import Journal, describe_file, hash_text
from iconformer_mm.inference.peers import Peers, in_torchrun
from iconformer_mm.inference.predictions import SCORE_THRESHOLD
from iconformer_mm.inference.ray_cluster import connected
from iconformer_mm.inference.ray_prediction import predict_with_ray
from iconformer_mm.messages import one_line
from iconformer_mm.version import __version__

from .errors import user_errors
from .parser import TRUST, Parser, guard

SUFFIXES = {'.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp'}


def find_images(names: Iterable[str], out: Path | None = None) -> list[Path]:
    """The image files that names stand for: files, folders (with all below them) and patterns.

    Args:
        names: The names.
        out: A folder whose files are left out: those that an earlier run wrote.

    Raises:
        SystemExit: A name stands for nothing.
    """
    found: dict[Path, None] = {}  # in order, each once
    for name in names:
        path = Path(name)
        if path.is_dir():
            files = sorted(p for p in path.rglob('*') if p.suffix.lower() in SUFFIXES and p.is_file())
            if out is not None and out.resolve() != path.resolve():
                files = [file for file in files if not file.resolve().is_relative_to(out.resolve())]
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


def say_skipped(path: Path, reason: str, console: Console) -> None:
    """Say why an image is left out."""
    console.print(one_line(f'skipped: {path} {reason}'), style='yellow', soft_wrap=True, markup=False)


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
    parser.add_argument('--restart', action='store_true', help='drop what a run that ended early has done')
    parser.add_argument(
        '--engine',
        choices=['local', 'ray'],
        default='local',
        help='local: in this process, or in those of torchrun; ray: on a Ray cluster',
    )
    parser.add_argument('--ray-address', help='address of a Ray cluster (default: one is started on this machine)')
    parser.add_argument('--workers', type=int, help='processes of Ray (default: one per GPU, or per CPU core)')
    args = parser.parse_args(argv)
    for name in ('ray_address', 'workers'):
        if getattr(args, name) is not None and args.engine != 'ray':
            parser.error(f'--{name.replace("_", "-")} is for --engine ray')
    if args.workers is not None and args.workers < 1:
        parser.error(f'--workers must be 1 or more, got {args.workers}')
    if args.engine == 'ray' and in_torchrun():
        parser.error('--engine ray starts its own processes; run it without torchrun')
    return args


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """What the results depend on, beside the images."""
    for file, what in ((args.adapter, 'adapter file'), (args.base, 'base')):
        if file is not None and not expanded(file).is_file():
            raise FileNotFoundError(f'the {what} {file} does not exist')
    return dict(
        config=hash_text(load_config(args.config).pretty_text),
        adapter=describe_file(args.adapter),
        base=describe_file(args.base),
        score=args.score,
        version=__version__,
    )


def predict_here(
    images: Sequence[tuple[Path, Path]], arguments: dict[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Predict in this process."""
    predictor = FilePredictor(**arguments)
    for index, (image, target) in enumerate(images):
        yield index, predictor(image, target)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; the status is 1 if an image was skipped. Under torchrun it is 0, since 1 is a failure there."""
    args = parse_args(argv)
    if args.engine == 'ray':
        require_extra('ray', 'predicting with --engine ray')
    guard(args)
    skipped = predict(args, Console(stderr=True))
    sys.exit(1 if skipped and not in_torchrun() else 0)


def predict(args: argparse.Namespace, console: Console) -> int:
    """Predict on what is not yet done, and write the results of all.

    Returns:
        The number of images that were skipped.
    """
    peers = Peers()
    # One process looks, since the others could see pictures that it has already written.
    images = [Path(name) for name in peers.on_first(lambda: [str(path) for path in find_images(args.images, args.out)])]
    run = peers.on_first(lambda: describe_run(args))
    args.out.mkdir(parents=True, exist_ok=True)
    journal = Journal(args.out, run)
    peers.on_first(lambda: journal.begin(args.restart))
    targets = dict(zip(images, (args.out / name for name in output_names(images))))
    done = set(peers.on_first(lambda: [str(image) for image in journal.results(images)]))
    rest = [image for image in images if str(image) not in done][peers.rank :: peers.size]
    if done and peers.rank == 0:
        console.print(f'going on: {len(done)} of {len(images)} images are done', soft_wrap=True)
    if rest:
        _predict_rest(args, console, journal, [(image, targets[image]) for image in rest], quiet=peers.rank > 0)
    journal.close()
    peers.meet()
    return peers.on_first(lambda: _finish(args, console, journal, images))


def _predict_rest(
    args: argparse.Namespace, console: Console, journal: Journal, images: list[tuple[Path, Path]], quiet: bool
) -> None:
    device = args.device
    if device is None and in_torchrun() and torch.cuda.is_available():
        device = f'cuda:{int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count()}'
    arguments = dict(
        config=args.config,
        adapter=args.adapter,
        base=args.base,
        device=device,
        trust=args.trust_checkpoints,
        score_threshold=args.score,
    )
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    on_ray = args.engine == 'ray'
    with (
        connected(args.ray_address) if on_ray else nullcontext(),
        Progress(*columns, console=console, disable=quiet) as progress,
    ):
        results = predict_with_ray(images, arguments, args.workers) if on_ray else predict_here(images, arguments)
        for index, record in progress.track(results, total=len(images), description='predicting'):
            image, _ = images[index]
            journal.append(image, record)
            if 'skipped' in record:
                say_skipped(image, record['skipped'], console)


def _finish(args: argparse.Namespace, console: Console, journal: Journal, images: list[Path]) -> int:
    """Write the one file of results; return the number of skipped images."""
    results = journal.results(images)
    changed = [image for image in images if image not in results]
    if changed:
        raise ValueError(f'{len(changed)} images changed while they were read, such as {changed[0]}; run it again')
    predictions = {str(image): record['prediction'] for image, record in results.items() if 'prediction' in record}
    skipped = [str(image) for image, record in results.items() if 'skipped' in record]
    write_json(args.out / 'predictions.json', dict(predictions=predictions, skipped=skipped))
    journal.remove()
    console.print(f'{len(predictions)} predictions in {args.out}, {len(skipped)} images skipped', soft_wrap=True)
    return len(skipped)
