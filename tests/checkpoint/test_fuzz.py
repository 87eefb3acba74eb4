"""A share of the damaged and hostile files of ``tests/fuzz_files.py``, which can make two thousand of them."""

import subprocess
import sys

from conftest import ROOT


def test_damaged_and_hostile_files_are_clear_errors(tmp_path):
    """In a process of its own: an audit hook cannot be taken off again."""
    command = [
        sys.executable,
        ROOT / 'tests' / 'fuzz_files.py',
        '--files',
        '60',
        '--stride',
        '37',
        '--out',
        tmp_path / 'x',
    ]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert '0 executed, 0 elsewhere, 0 unclear, 0 wrong, 0 slow' in result.stdout.splitlines()[-1]
