import re
import subprocess
import sys

from conftest import ROOT


def test_two_tasks():
    """One base answers two questions, far better than by chance and than without an adapter."""
    result = subprocess.run([sys.executable, ROOT / 'examples' / 'two_tasks.py'], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    scores = {m[1]: float(m[2]) for m in re.finditer(r'^(digit|turn): ([\d.]+) %', result.stdout, re.MULTILINE)}
    assert scores['digit'] > 80 and scores['turn'] > 60
    assert float(re.search(r'gets ([\d.]+) %', result.stdout)[1]) < scores['digit'] - 2
