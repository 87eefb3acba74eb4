"""Compare sizes and read and write times of checkpoints and adapter files with MMEngine's checkpoints.

python benchmarks/checkpoints.py --out work_dirs/checkpoints
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mmengine.runner import CheckpointLoader
from mmengine.runner import save_checkpoint as save_whole
from torch import nn

from iconformer_mm import inject, load_adapter, save_adapter
from iconformer_mm.checkpoint import fingerprint
from iconformer_mm.checkpoint.training_checkpoint import save_checkpoint
from iconformer_mm.engine.hooks.adapter_checkpoint_hook import frozen_state
from measure import Table, build_model, write_results

CASES = {
    'ViT-B/16, CIFAR-100': 'cifar100/vit-base-p16-mae_full_8xb128-100e_cifar100.py',
    'Swin-L UPerNet, ADE20K': 'ade20k/swin-large-in22k_upernet_full_8xb2-160k_ade20k-512x512.py',
}
COLUMNS = {'model': '', 'file': '', 'MiB': ',.1f', 'write (s)': '.2f', 'read (s)': '.2f'}


def stepped_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Make an AdamW for the trained parameters, with its state after one step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def seconds(function: Callable[[], object], rounds: int) -> float:
    """Measure the median time of a call, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def checkpoint_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Make the checkpoint that MMEngine's Runner would save."""
    return dict(
        meta=dict(epoch=1, iter=1),
        state_dict=dict(model.state_dict()),
        optimizer=optimizer.state_dict(),
        message_hub=dict(log_scalars={}, runtime_info={}, resumed_keys={}),
    )


def measure(name: str, config: str, folder: Path, rounds: int) -> list[dict]:
    """Measure the rows of a model."""
    rows = []

    def row(kind: str, path: Path, write: Callable[[], object], read: Callable[[], object]) -> None:
        written = seconds(write, rounds)
        values = (name, kind, path.stat().st_size / 2**20, written, seconds(read, rounds))
        rows.append(dict(zip(COLUMNS, values)))
        path.unlink()

    def read_into(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path, frozen: dict) -> None:
        checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu')
        model.load_state_dict({**frozen, **checkpoint['state_dict']})
        optimizer.load_state_dict(checkpoint['optimizer'])

    model = build_model(config)
    optimizer = stepped_optimizer(model)
    whole = folder / 'whole.pth'
    row(
        "full fine-tuning, MMEngine's checkpoint",
        whole,
        lambda: save_whole(checkpoint_of(model, optimizer), str(whole)),
        lambda: read_into(model, optimizer, whole, {}),
    )
    del model, optimizer

    model = build_model(config)
    inject(model, 'icon')
    optimizer = stepped_optimizer(model)
    row(
        "iCoN, MMEngine's checkpoint",
        whole,
        lambda: save_whole(checkpoint_of(model, optimizer), str(whole)),
        lambda: read_into(model, optimizer, whole, {}),
    )
    small, frozen = folder / 'small.safetensors', frozen_state(model)

    def save_small() -> None:
        checkpoint = checkpoint_of(model, optimizer)
        checkpoint['state_dict'] = {n: v for n, v in checkpoint['state_dict'].items() if n not in frozen}
        save_checkpoint(checkpoint, small)

    row('iCoN, adapter checkpoint', small, save_small, lambda: read_into(model, optimizer, small, frozen))
    for kind, part in (('iCoN, adapter file with head', model), ('iCoN, adapter file of the backbone', model.backbone)):
        row(kind, small, partial(save_adapter, part, small), partial(load_adapter, part, small))
    print(f'{name}: fingerprint of the base in {seconds(lambda: fingerprint(model), rounds):.2f} s', flush=True)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/checkpoints'), help='folder for the results')
    parser.add_argument('--rounds', type=int, default=3, help='number of rounds; times are medians over them (3)')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            rows += measure(name, config, Path(folder), args.rounds)
    write_results(args.out, [Table('checkpoints', COLUMNS, rows)], dict(rounds=args.rounds))


if __name__ == '__main__':
    main()
