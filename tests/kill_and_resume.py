"""Kill the quickstart's training with SIGKILL again and again, resume it, and compare the end.

    python tests/kill_and_resume.py --kills 50 --out work_dirs/kills
    python tests/kill_and_resume.py --kills 20 --processes 2 --filename-tmpl 'epoch_{:03d}.safetensors' --out ...

After each kill every file under a final name must be intact and no checkpoint
may be lost; each run that gets to its end must have the weights of the run that
was not disturbed, to the last bit. Every third kill waits until a file is being written.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from commands import start, start_ranks

from iconformer_mm.checkpoint import load_safetensors
from iconformer_mm.checkpoint.filename_template import FilenameTemplate

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'


class Training:
    """A training of the quickstart, in a process or several, with a checkpoint every epoch.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.epochs = args.epochs
        self.processes = args.processes
        self.template = FilenameTemplate(args.filename_tmpl)

    def start(self, folder: Path, resume: bool) -> Processes:
        """Start its processes, as a launcher would."""
        hook = 'default_hooks.checkpoint'
        options = [f'{hook}.type=AdapterCheckpointHook', f'{hook}.interval=1', f'{hook}.max_keep_ckpts=2']
        options += [f'{hook}.filename_tmpl={self.template.template}', f'{hook}.save_best=accuracy/top1']
        options += ['train_cfg.val_interval=2', f'train_cfg.max_epochs={self.epochs}']
        arguments = [CONFIG, '--work-dir', folder, *(['--resume'] * resume)]
        folder.mkdir(parents=True, exist_ok=True)
        printed = [folder / f'output_{rank}.log' for rank in range(self.processes)]
        script = ROOT / 'tools' / 'train.py'
        if self.processes == 1:
            return Processes([start(printed[0], script, *arguments, '--cfg-options', *options)])
        options.append('train_dataloader.batch_size=25')
        return Processes(start_ranks(printed, script, *arguments, '--cfg-options', *options, processes=self.processes))

    def newest(self, folder: Path) -> int:
        """The newest epoch with a checkpoint, 0 without one; all files that are there must be intact."""
        for path in folder.glob('*.safetensors'):
            load_safetensors(str(path))
        return max([0, *self.template.find(folder).values()])

    def has_newer(self, folder: Path, epoch: int) -> bool:
        """Whether there is a checkpoint of a later epoch, by the names of the files."""
        return any(found > epoch for found in self.template.find(folder).values())

    def final(self, folder: Path) -> dict[str, torch.Tensor]:
        """The weights at the end."""
        return load_safetensors(str(folder / self.template.template.format(self.epochs)))['state_dict']


class Processes:
    """The processes of one training."""

    def __init__(self, started: list[BaseProcess]) -> None:
        self.started = started

    def are_running(self) -> bool:
        """Whether none of them has ended."""
        return all(process.exitcode is None for process in self.started)

    def wait(self) -> int:
        """Wait for the end of all; 0 if all went well."""
        for process in self.started:
            process.join()
        return max(abs(process.exitcode or 0) for process in self.started)

    def kill(self) -> None:
        """End all by SIGKILL."""
        for process in self.started:
            process.kill()
        self.wait()


def wait_for(processes: Processes, seconds: float, condition=lambda *_: False, *arguments) -> bool:
    """Wait until a condition holds; False if the process ended or the time is over before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and processes.are_running():
        if condition(*arguments):
            return True
        time.sleep(0.0005)
    return False


def is_writing(folder: Path) -> bool:
    """Whether a file is being written."""
    return any(folder.glob('.writing-*'))


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; the status is 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--kills', type=int, default=50)
    parser.add_argument('--epochs', type=int, default=30)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--processes', type=int, default=1)
    parser.add_argument('--filename-tmpl', default='epoch_{}.safetensors')
    args = parser.parse_args(arguments)
    training = Training(args)
    rng = random.Random(args.seed)
    shutil.rmtree(args.out, ignore_errors=True)

    begin = time.monotonic()
    if training.start(args.out / 'whole', resume=False).wait() != 0:
        raise SystemExit(f'the undisturbed run failed; see {args.out}/whole/output_0.log')
    reference = training.final(args.out / 'whole')
    print(f'undisturbed run: {time.monotonic() - begin:.0f} s', flush=True)

    kills = inside = ends = 0
    folder = args.out / 'run_0'
    while True:
        before = training.newest(folder)
        processes = training.start(folder, resume=before > 0)
        if kills < args.kills and wait_for(processes, 240, training.has_newer, folder, before):
            if kills % 3 == 2:
                wait_for(processes, 60, is_writing, folder)
            else:
                wait_for(processes, rng.uniform(0, 3))
        if kills < args.kills and processes.are_running():
            processes.kill()
            kills += 1
            left = is_writing(folder)
            inside += left
            after = training.newest(folder)
            if after < before:
                raise SystemExit(f'kill {kills}: the checkpoint of epoch {before} is lost, the newest is {after}')
            print(f'kill {kills}: epoch {before} to {after}{", inside a save" if left else ""}', flush=True)
            continue
        if processes.wait() != 0:
            raise SystemExit(f'a run failed that was not killed; see {folder}/output_0.log')
        end = training.final(folder)
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
