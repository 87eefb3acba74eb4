"""The guides' code runs, and their links lead somewhere."""

import io
import json
import re
import sys

import pytest
import torch
from conftest import ROOT

sys.path[:0] = [str(ROOT / 'tests' / 'tuning'), str(ROOT / 'tools')]
from families import stir  # noqa: E402
from mmengine.registry import HOOKS  # noqa: E402
from rich.console import Console  # noqa: E402
from test_switching import classifier  # noqa: E402

from comparison import Board, load_comparison  # noqa: E402
from comparison_report import report  # noqa: E402
from iconformer_mm import active_adapter, inject, list_adapters, save_adapter  # noqa: E402

GUIDES = sorted((ROOT / 'docs').glob('*.md'))


def blocks(path):
    return re.findall(r'```python\n(.*?)```', path.read_text(encoding='utf-8'), re.DOTALL)


@pytest.mark.parametrize('path', GUIDES, ids=lambda path: path.name)
def test_links(path):
    for link in re.findall(r'\]\(((?!http)[^)#]+)\)', path.read_text(encoding='utf-8')):
        assert (path.parent / link).exists(), link
    for name in re.findall(r'python ((?:tools|tests|examples|benchmarks)/\w+\.py)', path.read_text(encoding='utf-8')):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize('path', [ROOT / 'README.md', ROOT / 'docs' / 'adapters.md'], ids=lambda path: path.name)
def test_adapters(path, tmp_path, monkeypatch):
    """The blocks about adapter files, on a small model whose head reads 32 channels."""
    monkeypatch.chdir(tmp_path)
    for name, num_classes in (('birds', 10), ('cars', 196)):
        source = classifier(num_classes)
        inject(source)
        save_adapter(stir(source), f'{name}.safetensors')
    model = classifier()
    inject(model, 'adaptformer')
    scope = dict(model=model, fresh_model=classifier(), classes=('a', 'b'))
    others = ('get_model', 'AdapterInferencer')
    code = [
        block
        for block in blocks(path)
        if ('AdapterCheckpointHook' in block or 'load_adapter(' in block) and not any(word in block for word in others)
    ]
    assert len(code) >= 2
    for block in code:
        exec(block.replace('in_channels=1024', 'in_channels=32'), scope)
    assert HOOKS.build(scope['default_hooks']['checkpoint']).filename_tmpl == 'epoch_{}.safetensors'
    assert active_adapter(model) == 'cars' and 'default' in list_adapters(model)


def test_methods(tmp_path, monkeypatch):
    """The blocks about methods, in turn, on a small model."""
    monkeypatch.chdir(tmp_path)
    model = classifier()
    keys = list(model.state_dict())
    scope = dict(model=model, torch=torch)
    code = blocks(ROOT / 'docs' / 'methods.md')
    assert len(code) == 3
    for block in code:
        exec(block, scope)
    assert list(torch.load(tmp_path / 'merged.pth')) == keys


def test_learning_rates():
    """The table of starting points has the rates that the comparison's searches took."""
    text = (ROOT / 'docs' / 'methods.md').read_text(encoding='utf-8').partition('## Learning rates to begin with')[2]
    shown = dict(re.findall(r'^\| `([\w-]+)` \| (.+ \| .+) \|$', text, re.MULTILINE))
    rows = json.loads((ROOT / 'docs' / 'comparison' / 'peft' / 'results.json').read_text())['rows']
    rates = {(row['method'], row['task']): f'{row["learning_rate"]:g}' for row in rows}
    expected = {m: ' | '.join(rates.get((m, task), '-') for task in ('digits', 'depth')) for m, _ in rates}
    assert {method: cells.replace('*', '') for method, cells in shown.items()} == expected


@pytest.mark.parametrize('name', ['peft', 'ablation'])
def test_comparison(name, tmp_path):
    """The tables of the report are those of its runs, and the runs those of the configs."""
    folder = ROOT / 'docs' / 'comparison' / name
    board = Board(load_comparison(ROOT / 'configs' / 'comparison' / f'{name}.yaml'), folder / 'cells')
    assert not board.stale and len(board.finished) == len(list(folder.glob('cells/*/*/*.json')))
    report(board, tmp_path, Console(file=io.StringIO()))
    for file in ('table.md', 'search.md', 'results.csv'):
        assert (tmp_path / file).read_text() == (folder / file).read_text(), file
    lines = (folder / 'table.md').read_text().split('\n\n', 1)[1]
    assert lines in (ROOT / 'docs' / 'comparison.md').read_text(encoding='utf-8')
