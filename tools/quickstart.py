"""Adapt a small pre-trained ViT to real handwritten digits by four methods, and compare them."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from mmengine.registry import init_default_scope
from rich.console import Console

from iconformer_mm import inject
from iconformer_mm.comparison.experiments import (
    ROOT,
    Run,
    add_run_arguments,
    check_frozen,
    execute_all,
    make_parser,
    print_table,
    to_markdown,
)
from iconformer_mm.comparison.plots import plot_comparison
from iconformer_mm.engine import load_config
from iconformer_mm.tuning import Summary

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


def accuracy(run: Run) -> float:
    """Accuracy in percent after training."""
    return run.scalars()[-1]['accuracy/top1']


def summarize_config(method: str) -> Summary:
    """Count what a method's config trains."""
    cfg = load_config(str(CONFIGS / f'vit-quickstart_{method}_digits.py'))
    init_default_scope(cfg.default_scope)
    from mmpretrain.registry import MODELS

    return inject(MODELS.build(cfg.model), cfg.custom_hooks[0].method)


def collect(method: str, runs: list[Run]) -> Result:
    """Read the runs of a method."""
    summary = summarize_config(method)
    adapter = runs[0].folder / 'adapter.safetensors'
    if method != 'full':
        check_frozen(runs, BASE)
    return Result(
        method=METHODS[method],
        trained_parameters=summary.trainable,
        backbone_share=summary.backbone_share,
        accuracies=[accuracy(run) for run in runs],
        seconds=statistics.mean(run.train_seconds() for run in runs),
        checkpoint_bytes=runs[0].checkpoint().stat().st_size,
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
    print_table(title, TITLES, rows_of(results), console)
    text = to_markdown([' '.join(words) for words in TITLES], rows_of(results))
    (folder / 'results.md').write_text(text, encoding='utf-8')
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
    parser = make_parser(__doc__, 'work_dirs/quickstart')
    add_run_arguments(parser)
    args = parser.parse_args()
    console = Console()
    start = time.time()
    args.out.mkdir(parents=True, exist_ok=True)

    runs = {
        method: [
            Run(
                CONFIGS / f'vit-quickstart_{method}_digits.py',
                args.out / f'{method}_seed{seed}',
                (f'randomness.seed={seed}', *args.cfg_options),
            )
            for seed in range(args.seeds)
        ]
        for method in METHODS
    }
    slowest_first = [run for method in reversed(METHODS) for run in runs[method]]
    execute_all(slowest_first, args.jobs, console, lambda run: f'{run.folder.name}: {accuracy(run):.1f} %')
    report([collect(m, runs[m]) for m in METHODS], args.seeds, args.out, console)
    console.print('frozen weights: bit-identical to the base in every run but those of full fine-tuning')
    console.print(f'{time.time() - start:.0f} s in all')


if __name__ == '__main__':
    main()
