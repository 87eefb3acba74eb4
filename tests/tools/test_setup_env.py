"""The set-up script says in one line what stops it, before it installs anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

TOOLS = ['bash', 'awk', 'cat', 'cksum', 'dirname', 'ls', 'mktemp', 'rm', 'sed', 'tail']


@pytest.fixture
def machine(tmp_path):
    """A machine with the usual tools, a Python, a compiler and a lot of disk."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(shutil.which(name))
    (folder / 'python3').symlink_to(sys.executable)
    script(folder / 'c++', 'exit 0')
    disk(folder, 50_000)
    return folder


def script(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f'#!{shutil.which("bash")}\n{text}\n')
    path.chmod(0o755)


def disk(folder: Path, free: int) -> None:
    script(folder / 'df', f"echo 'Filesystem 1048576-blocks Used Available'; echo '/dev/x 99999 1 {free} 1% /'")


def fail(machine: Path, *options: str, **environment) -> str:
    venv = machine.parent / 'venv'
    env = {'PATH': str(machine), 'ICONFORMER_MM_CACHE': str(machine.parent / 'cache'), **environment}
    command = ['bash', ROOT / 'tools' / 'setup_env.sh', *options, venv]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert not venv.exists()
    (line,) = result.stderr.splitlines()
    return line


def test_no_python(machine):
    script(machine / 'python3', 'exit 1')
    assert 'error: no Python 3.11 or 3.12 (with the venv module) found on PATH' in fail(machine)


def test_wrong_python(machine):
    script(machine / 'old', 'exit 1')
    assert 'PYTHON=old is not a working Python 3.11 or 3.12' in fail(machine, PYTHON='old')


def test_the_original_releases_end_at_python_3_11(machine):
    script(machine / 'python3', '[[ $* == *3.12* ]] && exit 0; exit 1')  # what a Python 3.12 would answer
    assert 'error: no Python 3.11 (with the venv module) found on PATH' in fail(machine, '--original')


def test_no_compiler(machine):
    (machine / 'c++').unlink()
    assert "error: compiling mmcv needs a C++ compiler and there is no 'c++'" in fail(machine)


def test_no_disk(machine):
    disk(machine, 300)
    assert 'error: the environment needs 9000 MiB free under' in fail(machine)


@pytest.mark.skipif(not (ROOT / '.venv' / '.iconformer_mm').is_file(), reason='not run from the environment it makes')
def test_a_complete_environment_is_left_alone():
    before = os.stat(ROOT / '.venv' / '.iconformer_mm').st_mtime_ns
    result = subprocess.run(['bash', ROOT / 'tools' / 'setup_env.sh'], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f'[setup] environment {ROOT / ".venv"} is complete'
    assert os.stat(ROOT / '.venv' / '.iconformer_mm').st_mtime_ns == before
