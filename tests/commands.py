"""Running a tool in a process of its own, as a user does; what it logged; and programs that stand in for others."""

import io
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import forkserver
from pathlib import Path

from conftest import ROOT, free_port

_processes = multiprocessing.get_context('forkserver')


def call(*command, ok=True, cwd=ROOT, **environment):
    """Run a command; return what it printed."""
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'PIP_NO_INDEX': '1', **environment}
    env['PATH'] = f'{Path(sys.executable).parent}:{env["PATH"]}'
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == ok, output[-5000:]
    return output


def start(printed, script, *arguments, cwd=ROOT, **environment):
    """Start a Python file as the interpreter does, with what it prints in a file.

    Its process is a copy of one that has imported the libraries, which takes most of a tool's seconds.
    """
    argv = [str(script), *map(str, arguments)]
    process = _processes.Process(target=run_script, args=(argv, str(cwd), str(printed), environment))
    process.start()
    return process


def run(script, *arguments, ok=True, **kwargs):
    """Run a Python file in a process of its own; return what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        printed = Path(folder, 'printed')
        process = start(printed, script, *arguments, **kwargs)
        process.join()
        output = printed.read_text() if printed.exists() else ''
    assert (process.exitcode == 0) == ok, output[-5000:]
    return output


def tool(name, *arguments, **kwargs):
    """Run a tool in a process of its own; return what it printed."""
    return run(ROOT / 'tools' / name, *arguments, **kwargs)


def start_ranks(printed, script, *arguments, processes=2):
    """Start a tool in several processes of one training, as a launcher does; rank N prints to ``printed[N]``."""
    environment = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(), WORLD_SIZE=str(processes))
    return [
        start(
            printed[rank], script, *arguments, '--launcher=pytorch', RANK=str(rank), LOCAL_RANK=str(rank), **environment
        )
        for rank in range(processes)
    ]


def ranks(name, *arguments, processes=2):
    """Run a tool in several processes of one training; return what all printed."""
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, str(rank)) for rank in range(processes)]
        started = start_ranks(printed, ROOT / 'tools' / name, *arguments, processes=processes)
        for process in started:
            process.join()
        output = ''.join(file.read_text() for file in printed if file.exists())
    assert all(process.exitcode == 0 for process in started), output[-5000:]
    return output


def run_script(argv, cwd, printed, environment):
    """What such a process does."""
    os.environ.update(environment)
    forkserver._forkserver.ensure_running = lambda: None  # its own children come from the same server
    out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, 'w', closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, 'w', closefd=False), line_buffering=True)
    os.chdir(cwd)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    status = 0
    try:
        runpy.run_path(argv[0], run_name='__main__')
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if status and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)


def scalars(work_dir):
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def programs(folder, monkeypatch, **scripts):
    """Put shell scripts on PATH in place of programs."""
    folder.mkdir()
    for name, text in scripts.items():
        (folder / name.replace('_', '-')).write_text(f'#!/bin/sh\n{text}\n')
        (folder / name.replace('_', '-')).chmod(0o755)
    monkeypatch.setenv('PATH', str(folder), prepend=os.pathsep)
