import json
import re
import sys

import pytest
from commands import run
from conftest import ROOT

NOTEBOOK = ROOT / 'examples' / 'adapt_a_classifier.ipynb'


def test_two_tasks():
    """One base answers two questions, far better than by chance and than without an adapter."""
    printed = run(ROOT / 'examples' / 'two_tasks.py')
    scores = {m[1]: float(m[2]) for m in re.finditer(r'^(digit|turn): ([\d.]+) %', printed, re.MULTILINE)}
    assert scores['digit'] > 80 and scores['turn'] > 60
    assert float(re.search(r'gets ([\d.]+) %', printed)[1]) < scores['digit'] - 2


def test_the_notebook_is_stored_clean():
    """Without outputs and without anything about the machine it was written on; its links lead somewhere."""
    notebook = json.loads(NOTEBOOK.read_text(encoding='utf-8'))
    assert notebook['metadata'] == dict(
        kernelspec=dict(display_name='Python 3', language='python', name='python3'), language_info=dict(name='python')
    )
    for cell in notebook['cells']:
        assert cell['metadata'] == {}
        assert cell['cell_type'] == 'markdown' or (cell['outputs'], cell['execution_count']) == ([], None)
        if cell['cell_type'] == 'markdown':
            for link in re.findall(r'\]\(((?!http)[^)#]+)', ''.join(cell['source'])):
                assert (NOTEBOOK.parent / link).exists(), link


def test_the_notebook_runs(tmp_path, monkeypatch):
    """In a fresh kernel of this interpreter, in an empty folder: it adapts, and gives the base back."""
    nbclient = pytest.importorskip('nbclient', reason='nbclient, which executes notebooks, is not installed')
    nbformat = pytest.importorskip('nbformat', reason='nbformat, which reads notebooks, is not installed')
    pytest.importorskip('ipykernel', reason='ipykernel, which notebooks run in, is not installed')
    kernel = tmp_path / 'jupyter' / 'kernels' / 'python3'
    kernel.mkdir(parents=True)
    command = [sys.executable, '-m', 'ipykernel_launcher', '-f', '{connection_file}']
    (kernel / 'kernel.json').write_text(json.dumps(dict(argv=command, display_name='Python 3', language='python')))
    monkeypatch.setenv('JUPYTER_PATH', str(tmp_path / 'jupyter'))
    monkeypatch.setenv('JUPYTER_RUNTIME_DIR', str(tmp_path / 'runtime'))
    monkeypatch.setenv('IPYTHONDIR', str(tmp_path / 'ipython'))
    monkeypatch.delenv('MPLBACKEND', raising=False)  # pictures are to be inline
    folder = tmp_path / 'folder'
    folder.mkdir()

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    resources = dict(metadata=dict(path=str(folder)))
    nbclient.NotebookClient(notebook, resources=resources, startup_timeout=600).execute()  # raises what a cell raises
    outputs = [output for cell in notebook.cells if cell.cell_type == 'code' for output in cell.outputs]
    assert {output.name for output in outputs if output.output_type == 'stream'} == {'stdout'}
    printed = ''.join(output.text for output in outputs if output.output_type == 'stream')

    scores = {m[1]: float(m[2]) for m in re.finditer(r'^accuracy (.+): ([\d.]+) %', printed, re.MULTILINE)}
    assert scores['before adapting'] < 40 < 80 < scores['after adapting']
    assert scores['after adapting'] == scores['of iCoN after training']  # the file holds what was trained
    assert 'trained share of the backbone: 4.517%' in printed
    sizes = dict(re.findall(r'^(\S+): ([\d,]+) KiB$', printed, re.MULTILINE))
    assert int(sizes['adapter.safetensors']) < 0.1 * int(sizes['epoch_15.pth'].replace(',', ''))
    assert 'adapted: features equal those of the base: False' in printed
    assert 'removed: features equal those of the base: True' in printed
    assert sum('image/png' in output.get('data', {}) for output in outputs) == 3
    assert not list(folder.iterdir())
