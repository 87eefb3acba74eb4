"""Adapt a small pre-trained ViT to real handwritten digits by four methods, and compare them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from mmengine.registry import init_default_scope
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file

from iconformer_mm import inject
from iconformer_mm.apis import load_config
from iconformer_mm.tuning import Summary
from iconformer_mm.visualization import plot_comparison

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / 'configs' / 'quickstart'
BASE = CONFIGS / 'vit-quickstart_strokes.safetensors'
METHODS = {
    'frozen': 'linear probing',
    'adaptformer': 'AdaptFormer',
    'icon': 'iCoN',
    'full': 'full fine-tuning',
}
TITLES = [
    ('method',),
    ('trained', 'params'),
    ('backbone', 'share'),
    ('accuracy', '(%)'),
    ('seconds',),
    ('checkpoint', '(KiB)'),
    ('adapter', '(KiB)'),
]


@dataclass
class Result:
    """One row of the table."""

    method: str
    trained_parameters: int
    backbone_share: float
    accuracies: list[float]
    seconds: float
    checkpoint_bytes: int
    adapter_bytes: int | None

    @property
    def mean(self) -> float:
        """Mean accuracy in percent."""
        return statistics.mean(self.accuracies)

    @property
    def std(self) -> float:
        """Standard deviation of the accuracy over the seeds."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def train(method: str, seed: int, folder: Path, options: list[str]) -> None:
    """Train one method with one seed in a process of its own, on one core."""
    config = CONFIGS / f'vit-quickstart_{method}_digits.py'
    command = [sys.executable, ROOT / 'tools' / 'train.py', config, '--work-dir', folder]
    command += ['--cfg-options', f'randomness.seed={seed}', *options]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with open(folder / 'output.log', 'w') as log:
        code = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    if code != 0:
        tail = '\n'.join((folder / 'output.log').read_text().splitlines()[-15:])
        raise RuntimeError(f'{config.name} with seed {seed} failed; the end of {folder / "output.log"}:\n{tail}')


def scalars(folder: Path) -> list[dict]:
    """What mmengine's logger wrote about a run."""
    (path,) = folder.glob('*/vis_data/scalars.json')
    return [json.loads(line) for line in path.read_text().splitlines()]


def summarize_config(method: str) -> Summary:
    """Count what a method's config trains."""
    cfg = load_config(str(CONFIGS / f'vit-quickstart_{method}_digits.py'))
    init_default_scope(cfg.default_scope)
    from mmpretrain.registry import MODELS

    return inject(MODELS.build(cfg.model), cfg.custom_hooks[0].method)


def check_frozen(checkpoint: Path) -> None:
    """Compare every backbone weight with the base's, bit by bit."""
    state = torch.load(checkpoint, map_location='cpu', weights_only=False)['state_dict']
    for name, value in load_file(BASE).items():
        if not torch.equal(value, state[f'backbone.{name}']):
            raise RuntimeError(f'{checkpoint}: the frozen tensor backbone.{name} changed in training')


def collect(method: str, folders: list[Path]) -> Result:
    """Read the runs of a method."""
    summary = summarize_config(method)
    logs = [scalars(folder) for folder in folders]
    (checkpoint,) = folders[0].glob('epoch_*.pth')
    adapter = folders[0] / 'adapter.safetensors'
    if method != 'full':
        for folder in folders:
            check_frozen(next(folder.glob('epoch_*.pth')))
    per_step = [statistics.mean(line['time'] for line in log if 'loss' in line) for log in logs]
    steps = max(line['step'] for line in logs[0] if 'loss' in line)
    return Result(
        method=METHODS[method],
        trained_parameters=summary.trainable,
        backbone_share=summary.backbone_share,
        accuracies=[log[-1]['accuracy/top1'] for log in logs],
        seconds=statistics.mean(per_step) * steps,
        checkpoint_bytes=checkpoint.stat().st_size,
        adapter_bytes=adapter.stat().st_size if adapter.exists() else None,
    )


def rows_of(results: list[Result]) -> list[list[str]]:
    """The cells of the table."""
    return [
        [
            r.method,
            f'{r.trained_parameters:,}',
            f'{r.backbone_share:.2%}',
            f'{r.mean:.1f} ± {r.std:.1f}',
            f'{r.seconds:.0f}',
            f'{r.checkpoint_bytes / 2**10:,.0f}',
            f'{r.adapter_bytes / 2**10:,.0f}' if r.adapter_bytes else '-',
        ]
        for r in results
    ]


def report(results: list[Result], seeds: int, folder: Path, console: Console) -> None:
    """Print the table, and write it with the plot."""
    title = f'Strokes to digits, 20 images a class, mean ± std over {seeds} seeds'
    table = Table(title=title, title_justify='left', box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for index, words in enumerate(TITLES):
        table.add_column('\n'.join(words), justify='right' if index else 'left', no_wrap=True)
    for row in rows_of(results):
        table.add_row(*row)
    console.print(table)

    lines = ['| ' + ' | '.join(' '.join(title) for title in TITLES) + ' |', '|---' + '|---:' * (len(TITLES) - 1) + '|']
    lines += ['| ' + ' | '.join(row) + ' |' for row in rows_of(results)]
    (folder / 'results.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')
    (folder / 'results.json').write_text(json.dumps([asdict(r) for r in results], indent=2) + '\n', encoding='utf-8')
    plot_comparison(
        [r.method for r in results],
        [r.trained_parameters for r in results],
        [r.mean for r in results],
        [r.std for r in results],
        folder / 'accuracy.png',
        ylabel='accuracy on 900 digits (%)',
        title='A ViT of strokes adapted to digits, 20 images a class',
    )
    for name in ('results.md', 'results.json', 'accuracy.png'):
        console.print(f'wrote {folder / name}')


def main() -> None:
    """Run the tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, default=3, help='runs a method (default: 3)')
    parser.add_argument('--jobs', type=int, default=min(4, os.cpu_count() or 1), help='runs at a time, one core each')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/quickstart'), help='folder for all results')
    parser.add_argument('--cfg-options', nargs='*', default=[], help='settings for every run, as in train.py')
    args = parser.parse_args()
    console = Console()
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)

    folders = {m: [args.out / f'{m}_seed{s}' for s in range(args.seeds)] for m in METHODS}
    # The slowest first, so that no core idles at the end.
    jobs = [(m, s) for m in reversed(METHODS) for s in range(args.seeds)]
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(args.jobs) as pool:
        bar = progress.add_task('runs', total=len(jobs))
        futures = {pool.submit(train, m, s, folders[m][s], args.cfg_options): (m, s) for m, s in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                method, seed = futures[future]
                accuracy = scalars(folders[method][seed])[-1]['accuracy/top1']
                console.print(f'{METHODS[method]}, seed {seed}: {accuracy:.1f} %')
                progress.advance(bar)
        except (RuntimeError, KeyboardInterrupt) as error:
            pool.shutdown(wait=False, cancel_futures=True)
            raise SystemExit(str(error)) from None

    report([collect(m, folders[m]) for m in METHODS], args.seeds, args.out, console)
    console.print('frozen weights: bit-identical to the base in every run but those of full fine-tuning')
    console.print(f'{time.time() - start:.0f} s in all')


if __name__ == '__main__':
    main()
