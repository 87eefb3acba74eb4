"""Running a tool in a process of its own, as a user does; and what it logged."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def call(*command, ok=True, cwd=ROOT, **environment):
    """Run a command; return what it printed."""
    env = {**os.environ, 'OMP_NUM_THREADS': '2', 'PIP_NO_INDEX': '1', **environment}
    env['PATH'] = f'{Path(sys.executable).parent}:{env["PATH"]}'
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == ok, output[-5000:]
    return output


def tool(name, *arguments, **kwargs):
    return call(sys.executable, ROOT / 'tools' / name, *arguments, **kwargs)


def scalars(work_dir):
    files = sorted(Path(work_dir).glob('*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]
