"""Run all that needs a GPU in one go: at most nine minutes, most valuable first, each result written as it comes.

    python benchmarks/gpu.py --out work_dirs/gpu
    python benchmarks/gpu.py --list

A bare machine needs torch with CUDA and Triton. The rest travels as wheels without dependencies, under 64 MB; make them
where there is a package index, and install them on the machine:

    pip wheel --no-deps --wheel-dir wheels . onedl-mmengine onedl-mmpretrain timm torchao addict yapf termcolor rich
    pip install --no-index --no-deps wheels/*.whl

The first parts need no more than that. Parts whose libraries are missing are noted as such, and the others run. A part
that fails, or that runs out of its time, does not end the run. The same command goes on with the parts that are left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from iconformer_mm.files import write_json

ROOT = Path(__file__).resolve().parent.parent
BUDGET = 9 * 60
_STEP = ('benchmarks/step.py', '--device', 'cuda', '--dtype', 'bfloat16', '--memory', '--rounds', '5')
_QUANTISED = ('benchmarks/quantized_base.py', '--device', 'cuda')
_METHODS = ('--methods', 'full', 'frozen', 'icon', 'adaptformer', 'lora')


@dataclass(frozen=True)
class Part:
    """One measurement, in a process of its own.

    Attributes:
        command: Arguments of Python. ``OUT`` in them stands for the part's folder.
        seconds: The most that it may take.
        needs: Packages that it imports beside torch.
    """

    command: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ('mmengine',)


# In order of worth.
PARTS: dict[str, Part] = {
    'operators': Part(
        ('-m', 'pytest', '-q', '-p', 'no:cacheprovider', 'tests/ops', '-k', 'on_a_gpu'), 100, ('pytest',)
    ),
    'op': Part(('benchmarks/op.py', '--device', 'cuda', '--rounds', '5', '--out', 'OUT'), 60),
    'vit-b': Part((*_STEP, '--cases', 'vit-b', *_METHODS, '--out', 'OUT'), 80, ('mmpretrain',)),
    'swin-b': Part((*_STEP, '--cases', 'swin-b', *_METHODS, '--out', 'OUT'), 80, ('mmpretrain',)),
    'compiled': Part(
        (*_STEP[:-4], '--rounds', '5', '--cases', 'vit-b', '--methods', 'full', 'icon', '--compile', '--out', 'OUT'),
        60,
        ('mmpretrain',),
    ),
    'quantised': Part(
        (
            'benchmarks/quantized_base.py',
            '--device',
            'cuda',
            '--parts',
            'memory',
            'time',
            '--cases',
            'vit-b',
            '--rounds',
        )
        + ('3', '--out', 'OUT'),
        60,
        ('mmpretrain', 'torchao'),
    ),
    'prefix-cache': Part(
        ('benchmarks/prefix_cache.py', '--generated', '--views', '4', '--seeds', '1', '--steps', '40', '--out', 'OUT'),
        60,
        ('mmpretrain',),
    ),
    'mixed': Part(
        ('benchmarks/mixed_batch.py', '--device', 'cuda', '--cases', 'vit-b', '--rounds', '3', '--out', 'OUT'),
        60,
        ('mmpretrain',),
    ),
    # One process alone: that the strategy runs on a GPU. What it gives is tested by processes on the CPU.
    'sharded': Part(
        ('-m', 'torch.distributed.run', '--nproc_per_node', '1', 'tools/train.py')
        + ('configs/quickstart/vit-quickstart_icon_digits.py', '--launcher', 'pytorch', '--work-dir', 'OUT')
        + ('--cfg-options', 'runner_type=FlexibleRunner', 'strategy.type=FSDPStrategy', 'train_cfg.max_epochs=2'),
        40,
        ('mmpretrain', 'sklearn'),
    ),
}


def missing_of(part: Part) -> list[str]:
    """The packages that a part needs and that are not installed."""
    return [name for name in part.needs if find_spec(name) is None]


def run_part(name: str, part: Part, folder: Path, seconds: float) -> dict:
    """Run a part, and say how it ended.

    Args:
        name: Its name.
        part: The part.
        folder: Folder of all results; the part's own lies in it, with its output as ``output.log``.
        seconds: The most that it may take.

    Returns:
        ``state`` (``done``, ``failed``, ``out of time`` or ``not installed: ...``) and ``seconds``.
    """
    missing = missing_of(part)
    if missing:
        return dict(state=f'not installed: {", ".join(missing)}', seconds=0.0)
    own = folder / name
    own.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), str(ROOT / 'benchmarks'), os.environ.get('PYTHONPATH', '')]
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *(str(own) if word == 'OUT' else word for word in part.command)]
    start = time.monotonic()
    with open(own / 'output.log', 'w', encoding='utf-8') as log:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
            state = 'done' if done.returncode == 0 else 'failed'
        except subprocess.TimeoutExpired:
            state = 'out of time'
    return dict(state=state, seconds=round(time.monotonic() - start, 1))


def run_parts(parts: Mapping[str, Part], folder: Path, budget: float) -> dict[str, dict]:
    """Run parts in order until the budget is used up; ``states.json`` is written after each.

    Args:
        parts: The parts by name.
        folder: Folder of the results. Parts that it has as done are not run again.
        budget: Seconds for all.

    Returns:
        How each ended.
    """
    path = folder / 'states.json'
    states: dict[str, dict] = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
    end = time.monotonic() + budget
    for name, part in parts.items():
        left = end - time.monotonic()
        if states.get(name, {}).get('state') == 'done':
            continue
        states[name] = run_part(name, part, folder, min(part.seconds, left)) if left > 5 else dict(state='no time left')
        write_json(path, states)
        print(f'{name}: {states[name]["state"]} ({states[name].get("seconds", 0)} s)', flush=True)
    return states


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu'), help='folder for the results')
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS), help='what to run (all)')
    parser.add_argument('--seconds', type=float, default=BUDGET, help=f'for all parts together ({BUDGET})')
    parser.add_argument('--list', action='store_true', help='show the parts and what they need, and end')
    args = parser.parse_args(argv)
    if args.list:
        for name in args.parts:
            print(f'{name}: at most {PARTS[name].seconds} s; {" ".join(PARTS[name].command)}')
        return 0
    if not torch.cuda.is_available():
        raise SystemExit('torch sees no CUDA device here; this script measures on a GPU only')
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / 'machine.json', dict(device=torch.cuda.get_device_name(), torch=torch.__version__))
    states = run_parts({name: PARTS[name] for name in args.parts}, out, args.seconds)
    return int(any(state['state'] == 'failed' for state in states.values()))


if __name__ == '__main__':
    sys.exit(main())
