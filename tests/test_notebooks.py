"""The notebooks run, and end in what they show."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient


def text_of(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == 'error']
    return '\n'.join(output.text for output in outputs if output.output_type == 'stream' and output.name == 'stdout')


def figures(text):
    """The accuracies that a notebook prints: frozen, iCoN, loaded, on the bare base."""
    return [float(value) for value in re.findall(r': ([\d.]+) %', text)]


@pytest.mark.parametrize('path', sorted((ROOT / 'examples').glob('*.ipynb')), ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    """Run again it says what its outputs in the file say, but for rounding; the file is small."""
    assert path.stat().st_size < 100_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    kept = figures(text_of(notebook))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=str(path.parent)))).execute()
    frozen, icon, loaded, bare = found = figures(text_of(notebook))
    assert icon > frozen + 1 and loaded == icon and bare < icon - 5
    assert len(kept) == 4 and max(abs(a - b) for a, b in zip(kept, found)) < 2, (kept, found)
