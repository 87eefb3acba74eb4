"""Measure the peak memory of loading a large base, each way in a fresh process.

    python benchmarks/loading.py --out work_dirs/loading
    python benchmarks/loading.py --model vit_small_patch14_dinov2 --ways whole shards

Random weights of a timm model are written to shards of a temporary folder, in bfloat16. Then each way builds the model,
adapts it by iCoN and loads the weights:

- ``whole``: build with values, read all shards into one state dict, load it, then round or pack the base.
- ``shards``: ``empty_parameters`` and ``load_shards``.

The peak is the process's largest resident memory minus what was resident before the model was built (Linux). The held
weights are the bytes of all parameters and buffers at the end. Results are printed and written as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from iconformer_mm import inject
from iconformer_mm.checkpoint import empty_parameters, load_shards
from iconformer_mm.checkpoint.shards import INDEX, find_stored
from iconformer_mm.files import require_space, write_json

MIB = 2**20
WAYS = ('whole', 'shards')
PRECISIONS = ('bfloat16', 'int8', 'float8', 'nf4', 'none')


def build(name: str) -> nn.Module:
    """Build a timm model without a classifier."""
    import timm

    return timm.create_model(name, num_classes=0, dynamic_img_size=True)


def write_shards(name: str, folder: Path, shard_mib: int) -> Path:
    """Write random weights of a model in bfloat16, shard by shard, and their index."""
    with empty_parameters():
        model = build(name)
    # Repeated, since a billion random numbers take long.
    drawn = (0.02 * torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0))).bfloat16()
    placed: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    tensors = list(model.state_dict().items())
    require_space(folder, sum(2 * value.numel() for _, value in tensors), 'the weights')
    for index, (tensor, value) in enumerate(tensors):
        count = value.numel()
        shard[tensor] = drawn.repeat(-(-count // len(drawn)))[:count].view(value.shape).clone()
        if sum(v.nbytes for v in shard.values()) >= shard_mib * MIB or index == len(tensors) - 1:
            file = f'model-{len(set(placed.values())):05d}.safetensors'
            save_file(shard, folder / file)
            placed.update(dict.fromkeys(shard, file))
            shard = {}
    path = folder / f'model{INDEX}'
    path.write_text(json.dumps(dict(metadata={}, weight_map=placed)), encoding='utf-8')
    return path


def memory_of(field: str) -> int:
    """Bytes of a field of Linux's process status: ``VmRSS`` is resident now, ``VmHWM`` the largest so far."""
    lines = Path('/proc/self/status').read_text(encoding='ascii').splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(way: str, name: str, index: str, precision: str) -> dict[str, Any]:
    """Load in one way. Call it in a fresh process."""
    torch.set_num_threads(1)
    frozen_dtype = None if precision == 'none' else precision
    small = build('vit_tiny_patch16_224')  # libraries are imported and warmed up before the measurement
    inject(small, 'icon', frozen_dtype=frozen_dtype)
    del small
    gc.collect()
    before, start = memory_of('VmRSS'), time.perf_counter()
    Path('/proc/self/clear_refs').write_text('5', encoding='ascii')  # forgets the largest so far
    if way == 'shards':
        with empty_parameters():
            model = build(name)
        inject(model, 'icon', frozen_dtype=frozen_dtype)
        load_shards(model, index)
    else:
        model = build(name)
        state: dict[str, torch.Tensor] = {}
        stored = find_stored(index)
        for path in {place.path for place in stored.values()}:
            with open(path, 'rb') as file:
                state.update({n: p.read(file) for n, p in stored.items() if p.path == path})
        model.load_state_dict(state)
        del state
        inject(model, 'icon', frozen_dtype=frozen_dtype)
    seconds = time.perf_counter() - start
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    peak = memory_of('VmHWM') - before
    return dict(
        way=way,
        model=name,
        frozen_dtype=frozen_dtype,
        parameters=sum(place.shape.numel() for place in find_stored(index).values()),
        held_mib=held / MIB,
        peak_mib=peak / MIB,
        ratio=peak / held,
        seconds=seconds,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='vit_giant_patch14_dinov2', help='a timm model (ViT-g, 1.1 B parameters)')
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=['shards'])
    parser.add_argument('--precisions', nargs='+', choices=PRECISIONS, default=['bfloat16'])
    parser.add_argument('--shard-mib', type=int, default=500, help='size of a shard (500)')
    parser.add_argument('--folder', type=Path, help='where to write the shards; it is emptied of them (temporary)')
    parser.add_argument('--out', type=Path, help='folder for results.json')
    args = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        index = write_shards(args.model, Path(folder), args.shard_mib)
        for precision in args.precisions:
            for way in args.ways:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
                    rows.append(pool.submit(measure, way, args.model, os.fspath(index), precision).result())
                print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        write_json(args.out / 'results.json', dict(rows=rows, torch=torch.__version__))


if __name__ == '__main__':
    main()
