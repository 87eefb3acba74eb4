"""Kill the quickstart's training with SIGKILL again and again, resume it, and compare the end.

    python tests/kill_and_resume.py --kills 50 --out work_dirs/kills

After each kill every file under a final name must be intact and no checkpoint
may be lost; each run that gets to its end must have the weights of the run that
was not disturbed, to the last bit. Every third kill waits until a file is being written.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from iconformer_mm.checkpoint import load_safetensors

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'


def start(folder: Path, epochs: int, resume: bool) -> subprocess.Popen:
    """Start the training with a checkpoint every epoch."""
    hook = 'default_hooks.checkpoint'
    command = [sys.executable, ROOT / 'tools' / 'train.py', CONFIG, '--work-dir', folder]
    command += ['--resume'] * resume
    command += ['--cfg-options', f'{hook}.type=AdapterCheckpointHook', f'{hook}.interval=1', f'{hook}.max_keep_ckpts=2']
    command += [f'{hook}.save_best=accuracy/top1', 'train_cfg.val_interval=2', f'train_cfg.max_epochs={epochs}']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'output.log', 'a') as log:
        return subprocess.Popen([str(c) for c in command], stdout=log, stderr=subprocess.STDOUT, env=environment)


def newest(folder: Path) -> int:
    """The newest epoch with a checkpoint, 0 without one; all files that are there must be intact."""
    epochs = [0]
    for path in folder.glob('*.safetensors'):
        load_safetensors(str(path))
        match = re.fullmatch(r'epoch_(\d+)\.safetensors', path.name)
        epochs += [int(match[1])] if match else []
    return max(epochs)


def final(folder: Path, epochs: int) -> dict[str, torch.Tensor]:
    """The weights at the end."""
    return load_safetensors(str(folder / f'epoch_{epochs}.safetensors'))['state_dict']


def wait_for(process: subprocess.Popen, seconds: float, condition=lambda *_: False, *arguments) -> bool:
    """Wait until a condition holds; False if the process ended or the time is over before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition(*arguments):
            return True
        time.sleep(0.0005)
    return False


def is_writing(folder: Path) -> bool:
    """Whether a file is being written."""
    return any(folder.glob('.writing-*'))


def has_newer(folder: Path, epoch: int) -> bool:
    """Whether there is a checkpoint of a later epoch, by the names of the files."""
    found = [re.fullmatch(r'epoch_(\d+)\.safetensors', path.name) for path in folder.glob('epoch_*')]
    return any(int(match[1]) > epoch for match in found if match)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; the status is 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(arguments)
    rng = random.Random(args.seed)
    shutil.rmtree(args.out, ignore_errors=True)

    begin = time.monotonic()
    if start(args.out / 'whole', args.epochs, resume=False).wait() != 0:
        raise SystemExit(f'the undisturbed run failed; see {args.out}/whole/output.log')
    reference = final(args.out / 'whole', args.epochs)
    print(f'undisturbed run: {time.monotonic() - begin:.0f} s', flush=True)

    kills = inside = ends = 0
    folder = args.out / 'run_0'
    while True:
        before = newest(folder)
        process = start(folder, args.epochs, resume=before > 0)
        if kills < args.kills and wait_for(process, 120, has_newer, folder, before):
            if kills % 3 == 2:
                wait_for(process, 60, is_writing, folder)
            else:
                wait_for(process, rng.uniform(0, 3))
        if kills < args.kills and process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            left = is_writing(folder)
            inside += left
            after = newest(folder)
            if after < before:
                raise SystemExit(f'kill {kills}: the checkpoint of epoch {before} is lost, the newest is {after}')
            print(f'kill {kills}: epoch {before} to {after}{", inside a save" if left else ""}', flush=True)
            continue
        if process.wait() != 0:
            raise SystemExit(f'a run failed that was not killed; see {folder}/output.log')
        end = final(folder, args.epochs)
        if end.keys() != reference.keys() or not all(torch.equal(end[n], reference[n]) for n in end):
            raise SystemExit(f'{folder}: the end is not that of the undisturbed run')
        ends += 1
        if kills >= args.kills:
            break
        folder = args.out / f'run_{ends}'
    print(f'{kills} kills, {inside} of them inside a save; 0 checkpoints lost; {ends} ends, all bit-identical')
    return 0


if __name__ == '__main__':
    sys.exit(main())
