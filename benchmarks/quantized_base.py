"""Measure what a base in bfloat16, 8 or 4 bits saves and costs: memory, step time, output error and accuracy.

    python benchmarks/quantized_base.py --out work_dirs/quantized_base
    python benchmarks/quantized_base.py --parts memory --cases upernet-swin-l --rounds 0
    python benchmarks/quantized_base.py --parts accuracy --seeds 3

Weights are the bytes of the backbone's frozen tensors, to float32. The peak is that of live tensors in a training step,
each contestant in a fresh process, see ``step.LiveTensors``. The error is that of the backbone's outputs to those in
float32, on random images. The probe is a linear classifier on DINOv2-S's class tokens, fitted to several draws of 20
images a class of Fashion-MNIST. Accuracy is that of iCoN trained on one such draw, as in
``iconformer quickstart --real``; each run uses the same seeds and images. Results are written as they come.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn

from iconformer_mm import inject
from iconformer_mm.analysis import inspection
from iconformer_mm.checkpoint.real_base import cache_folder, fetch_base
from iconformer_mm.cli.quickstart_real import BLOCKS, CONFIG, settings_of
from iconformer_mm.datasets.few_shot import find_fashion_mnist, write_fashion_mnist
from iconformer_mm.engine import add_peft, load_config
from iconformer_mm.engine.launch import build_runner
from iconformer_mm.tuning.freezing import is_adapter
from measure import (
    Table,
    interleave,
    make_parser,
    prepare,
    progress_bar,
    rows_of,
    write_results,
)
from measure import settings_of as machine_settings
from step import CASES, MIB, Case, LiveTensors, build, make_data, training

PRECISIONS = (None, 'bfloat16', 'int8', 'float8', 'nf4')
FULL = 'full fine-tuning'
PARTS = ('memory', 'time', 'giant', 'probe', 'accuracy')
STEPS = 2  # the optimizer's state appears in the first
DEFAULT_CASES = ('vit-b', 'upernet-swin-l')


def contestants() -> dict[str, dict[str, Any] | None]:
    """Return the arguments of :func:`inject` by contestant; None for an unadapted model."""
    adapted = {f'iCoN, {p or "float32"}': dict(method='icon', frozen_dtype=p) for p in PRECISIONS}
    frugal = {f'{name}, with_cp': dict(options, with_cp=True) for name, options in adapted.items()}
    return {FULL: None, **adapted, **frugal}


def adapted(case: Case, name: str, device: str) -> BaseModel:
    """Build the model of a contestant."""
    model = build(case, device)
    options = contestants()[name]
    if options is not None:
        inject(model, **options)
        model.to(device)
    return model


def frozen_bytes(backbone: nn.Module) -> int:
    """Return the bytes of a backbone's own parameters, quantised ones included."""
    own = {n: v for n, v in backbone.state_dict().items() if not is_adapter(n)}
    held = {n for n, _ in backbone.named_parameters()} | {n for n, v in own.items() if v.dtype == torch.uint8}
    return sum(v.numel() * v.element_size() for n, v in own.items() if n in held)


def measure_peak(case: Case, name: str, batch: int, device: str, threads: int) -> dict[str, float]:
    """Measure the weights and the peak of a contestant's training steps. Call it in a separate process."""
    torch.set_num_threads(threads)
    live = LiveTensors()
    with live:
        model = adapted(case, name, device)
        weights = frozen_bytes(model.backbone)
        step = training(model, make_data(model, case, batch, training=True), torch.float32)
        live.peak = live.alive  # without the float32 model that was quantised
        for _ in range(STEPS):
            step()
    return {'weights (MiB)': weights / MIB, 'peak (MiB)': live.peak / MIB}


def memory_rows(name: str, case: Case, args: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Measure the memory of all contestants of a case."""
    rows: list[dict[str, Any]] = []
    for contestant in progress.track(args.methods, description=f'{name}, memory'):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            settings = (args.batch or case.batch, args.device, args.threads)
            row = pool.submit(measure_peak, case, contestant, *settings).result()
        rows.append(dict(case=name, contestant=contestant, **row))
        print(rows[-1], flush=True)
    full = next((row for row in rows if row['contestant'] == FULL), None)
    if full is None:
        return rows
    for row in rows:
        row['weights to float32'] = row['weights (MiB)'] / full['weights (MiB)']
        row['peak to full'] = row['peak (MiB)'] / full['peak (MiB)']
    return rows


def flatten(outputs: Any) -> list[Tensor]:
    """List the tensors of a backbone's outputs."""
    return [outputs] if isinstance(outputs, Tensor) else [tensor for each in outputs for tensor in flatten(each)]


def time_rows(name: str, case: Case, args: argparse.Namespace, progress: Progress) -> list[dict[str, Any]]:
    """Time the training steps of a case, and measure the errors of the outputs."""
    plain = [n for n in args.methods if 'with_cp' not in n]
    models = {n: adapted(case, n, args.device) for n in plain}
    data = make_data(models[plain[0]], case, args.batch or case.batch, training=True)
    errors = {}
    with torch.no_grad():
        outputs = {n: flatten(m.eval().backbone(data['inputs'])) for n, m in models.items()}
    for n, values in outputs.items():
        pairs = list(zip(values, outputs[plain[0]]))
        errors[n] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    steps = {n: training(m, data, torch.float32) for n, m in models.items()}
    times = interleave(steps, args.rounds, progress, f'{name}, training', args.device, min_seconds=0)
    rows = rows_of(times, {'to float32': 'iCoN, float32', 'to full': FULL}, case=name)
    for row in rows:
        row['output error'] = errors[row['contestant']]
    return rows


def giant_rows() -> list[dict[str, Any]]:
    """Compute the weights of a ViT-g/14 on the meta device, where no memory is taken."""
    from mmpretrain.models.backbones import VisionTransformer

    rows: list[dict[str, Any]] = []
    for precision in PRECISIONS:
        with torch.device('meta'):
            model = VisionTransformer('dinov2-giant', img_size=224, patch_size=14, layer_scale_init_value=1e-5)
        inject(model, 'icon', frozen_dtype=precision)
        count = sum(p.numel() for n, p in model.named_parameters() if not is_adapter(n))
        rows.append(
            {
                'case': 'ViT-g/14 (meta device)',
                'contestant': f'iCoN, {precision or "float32"}',
                'weights (MiB)': frozen_bytes(model) / MIB,
            }
        )
        if precision is None:
            print(f'ViT-g/14: {count:,} parameters')
    for row in rows:
        row['weights to float32'] = row['weights (MiB)'] / rows[0]['weights (MiB)']
    return rows


def features_of(folder: Path, precision: str | None, base: Path) -> tuple[np.ndarray, np.ndarray]:
    """Compute DINOv2-S's class tokens of all images in a folder of folders, and their labels."""
    cfg: Config = load_config(str(CONFIG))
    cfg.model.backbone.init_cfg.checkpoint = str(base)
    model = inspection.build_model(cfg)
    model.backbone.init_weights()
    inject(model, 'frozen', frozen_dtype=precision)
    model.eval()
    tokens, labels = [], []
    for label, images in enumerate(sorted(folder.iterdir())):
        opened = [Image.open(path).convert('RGB') for path in sorted(images.iterdir())]
        pixels = [image.resize((84, 84), Image.Resampling.BICUBIC) for image in opened]
        batch = [torch.from_numpy(np.array(image)[:, :, ::-1].copy()).permute(2, 0, 1) for image in pixels]
        with torch.no_grad():
            inputs = model.data_preprocessor(dict(inputs=batch))['inputs']
            tokens.append(model.extract_feat(inputs)[-1].float())
        labels += [label] * len(batch)
    return torch.cat(tokens).numpy(), np.array(labels)


def probe_rows(args: argparse.Namespace, write: Any) -> list[dict[str, Any]]:
    """Fit a linear classifier to the tokens of each precision, for several draws of 20 images a class."""
    from sklearn.linear_model import LogisticRegression

    base = fetch_base('mmpretrain')
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        write_fashion_mnist(find_fashion_mnist(cache_folder()), data, 20 * args.seeds, args.test_images)
        for precision in args.precisions:
            own = None if precision == 'float32' else precision
            (x, y), (tests, truth) = (features_of(data / part, own, base) for part in ('train', 'test'))
            for seed in range(args.seeds):
                draw = slice(seed, None, args.seeds)
                fit = LogisticRegression(max_iter=2000).fit(x[draw], y[draw])
                value = 100 * float((fit.predict(tests) == truth).mean())
                rows.append(dict(method='linear probe', precision=precision, seed=seed, accuracy=value))
            print(rows[-args.seeds :], flush=True)
            write(rows)
    return rows


def train_few_shot(method: str, precision: str | None, seed: int, base: Path, data: Path, classes: list[str]) -> float:
    """Train DINOv2-S on a few images, and return the accuracy on the test images in percent."""
    cfg: Config = load_config(str(CONFIG))
    add_peft(cfg, method)
    cfg.merge_from_dict(settings_of(base, data, classes))
    cfg.merge_from_dict({'default_hooks.peft.frozen_dtype': precision, 'randomness.seed': seed})
    if method not in ('frozen', 'full'):
        cfg.merge_from_dict({'default_hooks.peft.blocks': BLOCKS})
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        runner = build_runner(cfg)
        runner.train()
        return float(runner.val_loop.run()['accuracy/top1'])


def accuracy_rows(args: argparse.Namespace, write: Any) -> list[dict[str, Any]]:
    """Train with each precision of the base and each seed. Write the rows after each run."""
    base = fetch_base('mmpretrain')
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        classes = write_fashion_mnist(find_fashion_mnist(cache_folder()), data, most=args.test_images)
        for seed in range(args.seeds):
            for method in args.few_shot_methods:
                for precision in args.precisions:
                    own = None if precision == 'float32' else precision
                    value = train_few_shot(method, own, seed, base, data, classes)
                    rows.append(dict(method=method, precision=precision, seed=seed, accuracy=value))
                    print(rows[-1], flush=True)
                    write(rows)
    return rows


def means_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average accuracies over the seeds that all precisions of a method have, and compare them with bfloat16."""
    means = []
    for method in dict.fromkeys(row['method'] for row in rows):
        own = [row for row in rows if row['method'] == method]
        names = dict.fromkeys(row['precision'] for row in own)
        seeds = [{row['seed'] for row in own if row['precision'] == name} for name in names]
        common = set.intersection(*seeds)
        values = {
            name: [row['accuracy'] for row in own if row['precision'] == name and row['seed'] in common]
            for name in names
        }
        for name, found in values.items() if common else ():
            row = {'method': method, 'precision': name, 'seeds': len(common), 'accuracy (%)': sum(found) / len(found)}
            if 'bfloat16' in values:
                differences = [a - b for a, b in zip(found, values['bfloat16'])]
                row['to bfloat16 (points)'] = sum(differences) / len(differences)
            means.append(row)
    return means


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__.partition('\n')[0], 'work_dirs/quantized_base', [*CASES], DEFAULT_CASES)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS, help='what to measure (all)')
    parser.add_argument('--methods', nargs='+', choices=contestants(), default=[*contestants()], metavar='METHOD')
    parser.add_argument('--batch', type=int, help="images per step (default: the case's own number)")
    parser.add_argument('--seeds', type=int, default=3, help='runs of each precision (3)')
    parser.add_argument('--test-images', type=int, default=100, help='test images of each class (100)')
    parser.add_argument('--few-shot-methods', nargs='+', default=['icon'], metavar='METHOD')
    names = ['float32', *(p for p in PRECISIONS if p)]
    parser.add_argument('--precisions', nargs='+', choices=names, default=names[1:])
    args = parser.parse_args()
    prepare(args, min_rounds=0)
    MMLogger.get_instance('mmengine', log_level='WARNING')
    found: dict[str, list[dict[str, Any]]] = {'memory': [], 'time': [], 'giant': [], 'accuracy': []}

    def write() -> None:
        memory = {'case': '', 'contestant': '', 'weights (MiB)': ',.1f', 'weights to float32': '.3f'}
        peak = {'peak (MiB)': ',.0f', 'peak to full': '.3f'}
        times = {'case': '', 'contestant': '', 'ms': '.0f', 'to float32': '.3f', 'to full': '.3f'}
        times['output error'] = '.2e'
        scores = {'method': '', 'precision': '', 'seeds': '', 'accuracy (%)': '.2f', 'to bfloat16 (points)': '+.2f'}
        tables = [
            Table('memory of a training step', {**memory, **peak}, found['memory']),
            Table('training step', times, found['time']),
            Table('weights of a giant', memory, found['giant']),
            Table('accuracy', scores, means_of(found['accuracy'])),
            Table('runs', dict.fromkeys(('method', 'precision', 'seed', 'accuracy'), ''), found['accuracy']),
        ]
        write_results(args.out, [table for table in tables if table.rows], machine_settings(args))

    probed: list[dict[str, Any]] = []

    def keep(rows: list[dict[str, Any]]) -> None:
        found['accuracy'] = [*probed, *rows]
        write()

    with progress_bar() as progress:
        if 'giant' in args.parts:
            found['giant'] = giant_rows()
            write()
        for name in args.cases:
            if 'memory' in args.parts:
                found['memory'] += memory_rows(name, CASES[name], args, progress)
                write()
            if 'time' in args.parts and args.rounds:
                found['time'] += time_rows(name, CASES[name], args, progress)
                write()
    if 'probe' in args.parts:
        probed += probe_rows(args, keep)
    if 'accuracy' in args.parts:
        accuracy_rows(args, keep)


if __name__ == '__main__':
    main()
