"""The documentation's code runs, its commands are those of the tools, and its links lead somewhere.

Most pages are run as they are, block by block, in a process of their own (tests/run_page.py). The
README, docs/adapters.md and docs/methods.md speak of models and files that are not there: tests/test_readme.py and
this module run their blocks on small ones.
"""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import run
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'tools'))
from families import stir  # noqa: E402
from mmengine.registry import HOOKS, MODELS, init_default_scope  # noqa: E402
from rich.console import Console  # noqa: E402
from run_page import FILE, read_blocks  # noqa: E402
from small_classifiers import classifier  # noqa: E402
from tool_parsers import parser_of_command, parser_of_tool  # noqa: E402

from iconformer_mm import active_adapter, inject, list_adapters, save_adapter  # noqa: E402
from iconformer_mm.comparison.results import Results  # noqa: E402
from iconformer_mm.comparison.spec import load_comparison  # noqa: E402
from iconformer_mm.comparison.tables import make_rows, report  # noqa: E402
from iconformer_mm.engine import load_config  # noqa: E402
from iconformer_mm.engine.config import find_config  # noqa: E402

README = ROOT / 'README.md'
ADAPTERS = ROOT / 'docs' / 'adapters.md'
PAGES = [README, *sorted((ROOT / 'docs').rglob('*.md')), *sorted((ROOT / 'configs').rglob('*.md'))]
# What these have in Python is run by the tests named.
BY_OTHERS = {
    'README.md': 'tests/test_readme.py',
    'docs/adapters.md': 'test_adapters, test_predict',
    'docs/methods.md': 'test_methods',
    'configs/_base_/peft/README.md': 'tests/test_method_files.py, as configs of the benchmarks',
}


def relative(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path):
    return [block.code for block in read_blocks(path, 'python')]


def anchors(path):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r'^#+ (.*)$', path.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).strip().replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('path', PAGES, ids=relative)
def test_links(path):
    for link in re.findall(r'\]\(((?!http)[^)\s]+)\)', path.read_text(encoding='utf-8')):
        file, _, anchor = link.partition('#')
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_index():
    """The index names every page."""
    index = (ROOT / 'docs' / 'README.md').read_text(encoding='utf-8')
    pages = {page.name for page in (ROOT / 'docs').glob('*.md')} - {'README.md', 'index.md'}
    assert [name for name in sorted(pages) if name not in index] == []


def commands_of(page):
    """The commands in a page's bash blocks, as words."""
    for block in read_blocks(page, 'bash'):
        for line in block.code.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = next((i for i, word in enumerate(words) if word in ('|', '&&', ';', '>')), len(words))
                yield words[:end]
                words = words[end + 1 :]


def check_command(words, parsers, written=()):
    """A command of ours has its file, or runs one that the page writes, and reads its arguments as the tool would."""
    for word in words:
        if '::' in word or word.startswith('configs/'):
            assert (ROOT / word).exists() or find_config(word), word
    if words[:1] == ['iconformer'] and not words[1].startswith('-'):
        parsers.setdefault(words[1], parser_of_command(words[1])).parse_args(words[2:])
    if words[:1] not in (['python'], ['bash']):
        return
    if words[1:3] == ['-m', 'iconformer_mm.adapter']:
        name, arguments = 'tools/adapter.py', words[3:]
    else:
        name, arguments = words[1], words[2:]
    if name.startswith('-') or name in written:  # python -c, python -m of others
        return
    assert (ROOT / name).is_file(), name
    if name in ('tools/dist_train.sh', 'tools/dist_test.sh'):  # ... CONFIG [CHECKPOINT] PROCESSES OPTIONS
        number = 1 if 'train' in name else 2
        name, arguments = (
            name.replace('dist_', '').replace('.sh', '.py'),
            [*arguments[:number], *arguments[number + 1 :]],
        )
    if name == 'tools/dist_predict.sh':  # ... PROCESSES ARGUMENTS
        name, arguments = 'tools/predict.py', arguments[1:]
    if name.endswith('.py'):
        if name not in parsers:
            parsers[name] = parser_of_tool(name)
        if parsers[name] is None:
            assert not arguments, f'{name} takes no arguments'
        else:
            parsers[name].parse_args(arguments)


def test_commands():
    """Every command of every page is read by the command line of its tool, without an error."""
    parsers, wrong, number = {}, [], 0
    for page in PAGES:
        written = {match[1] for match in map(FILE.match, blocks(page)) if match}
        for words in commands_of(page):
            number += 1
            try:
                check_command(words, parsers, written)
            except (AssertionError, FileNotFoundError, SystemExit) as error:
                wrong.append(f'{relative(page)}: {shlex.join(words)}: {error}')
    assert number > 30 and not wrong, '\n'.join(wrong)


@pytest.mark.parametrize(
    'path', [p for p in PAGES if relative(p) not in BY_OTHERS and read_blocks(p, 'python')], ids=relative
)
def test_page(path, tmp_path):
    """A page's blocks do what the page says."""
    run(ROOT / 'tests' / 'run_page.py', path, tmp_path / 'page')


def test_adapters(tmp_path, monkeypatch):
    """The blocks about adapter files, on a small model whose head reads 32 channels."""
    monkeypatch.chdir(tmp_path)
    for name, num_classes in (('birds', 10), ('cars', 196)):
        source = classifier(num_classes)
        inject(source)
        save_adapter(stir(source), f'{name}.safetensors')
    model = classifier()
    inject(model, 'adaptformer')
    scope = dict(model=model, fresh_model=classifier(), classes=('a', 'b'))
    code = [block for block in blocks(ADAPTERS) if 'AdapterInferencer' not in block]
    assert len(code) == len(blocks(ADAPTERS)) - 1 == 3
    for block in code:
        exec(block.replace('in_channels=1024', 'in_channels=32'), scope)
    assert HOOKS.build(scope['default_hooks']['checkpoint']).filename_tmpl == 'epoch_{}.safetensors'
    assert active_adapter(model) == 'cars' and 'default' in list_adapters(model)


def test_predict(tmp_path, monkeypatch):
    """The block about prediction, with small files of its names."""
    monkeypatch.chdir(tmp_path)
    digits = ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'
    Path('config.py').write_text(f"_base_ = '{digits}'\n")
    init_default_scope('mmpretrain')
    model = MODELS.build(load_config(str(digits)).model)
    torch.save(dict(state_dict=model.state_dict()), 'swin_base.pth')
    inject(model)
    for name in ('birds', 'dogs'):
        save_adapter(model, f'{name}.safetensors')
    cv2.imwrite('photo.jpg', np.zeros((40, 30, 3), np.uint8))
    scope = {}
    (code,) = [block for block in blocks(ADAPTERS) if 'AdapterInferencer' in block]
    exec(code, scope)
    assert scope['inferencer'].adapters == ['birds', 'dogs']


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
    rows = json.loads((ROOT / 'benchmarks' / 'results' / 'peft' / 'results.json').read_text())['rows']
    rates = {(row['method'], row['task']): f'{row["learning_rate"]:g}' for row in rows}
    expected = {m: ' | '.join(rates.get((m, task), '-') for task in ('digits', 'depth')) for m, _ in rates}
    assert {method: cells.replace('*', '') for method, cells in shown.items()} == expected


def test_real_comparison(tmp_path):
    """The differences in the docs are those of the runs, and the runs those of the config."""
    folder = ROOT / 'benchmarks' / 'results' / 'real'
    results = Results(load_comparison(ROOT / 'configs' / 'comparison' / 'real.yaml'), folder)
    assert not results.stale and len(results.finished) == len(list(folder.glob('runs/*/*/*.json'))) > 40
    report(results, tmp_path, Console(file=io.StringIO()))
    for file in ('differences.md', 'search.md', 'results.csv'):
        assert (tmp_path / file).read_text() == (folder / file).read_text(), file
    pages = [(ROOT / 'docs' / name).read_text(encoding='utf-8') for name in ('comparison.md', 'choosing.md')]
    for name in ('ranks', 'tradeoff'):
        shown = ROOT / 'docs' / 'images' / f'comparison_{name}.png'
        assert (folder / f'{name}.png').read_bytes() == shown.read_bytes()
    shown = 0
    for section in (folder / 'differences.md').read_text().split('\n## ')[1:]:
        table = section[section.index('|') :].strip()
        assert 'development' in section or table.count('\n') < 4 or table in pages[0]
        rows = {row[1]: row[2:] for row in (re.split(r' *\| *', line) for line in section.splitlines()) if len(row) > 5}
        static = rows.get('iCoN, static kernels')
        if static is not None:
            (_, mean, interval, *_), (seeds, own, own_interval, better, bounds, *_) = rows['iCoN'], static
            line = f'| {seeds} | {mean} ({interval}) | {own} ({own_interval}) | {better} | {bounds} |'
            assert all(line in page for page in pages), line
            shown += 1
    assert shown >= 3
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    rows = make_rows(results)
    names = dict(icon='iCoN', icon_static='`icon-static`', dora='DoRA', lora='LoRA', adaptformer='AdaptFormer')
    for method, title in {**names, 'frozen': 'linear probing'}.items():
        found = [rows[task, method] for task in ('fashion', 'objects', 'objects_conditions')]
        share = f'{100 * found[0].backbone_share:.2f}' if found[0].backbone_share else '0'
        assert f'| {title} | {share} | {" | ".join(f"{row.mean:.1f}" for row in found)} |' in readme


def test_costs_of_the_real_comparison():
    """The table of costs in the docs is that of the runs, and the runs those of the config."""
    folder = ROOT / 'benchmarks' / 'results' / 'costs'
    results = Results(load_comparison(ROOT / 'configs' / 'comparison' / 'costs.yaml'), folder)
    rows = {method: row for (_, method), row in make_rows(results).items()}
    assert not results.stale and list(rows) == list(results.comparison.methods)
    page = (ROOT / 'docs' / 'comparison.md').read_text(encoding='utf-8')
    for name, row in rows.items():
        title, step = results.comparison.methods[name].title, row.train_seconds / rows['full'].train_seconds
        counts = f'{row.trained_backbone:,} | {row.backbone_share:.2%}'
        assert f'| {title} | {counts} | {step:.2f} | {row.peak_memory / 2**20:,.0f} |' in page


@pytest.mark.parametrize(
    ('name', 'page'), [('peft', 'comparison_small'), ('ablation', 'comparison_small'), ('detectors', 'towers')]
)
def test_comparison(name, page, tmp_path):
    """The tables of the report are those of its runs, and the runs those of the configs."""
    folder = ROOT / 'benchmarks' / 'results' / name
    results = Results(load_comparison(ROOT / 'configs' / 'comparison' / f'{name}.yaml'), folder)
    assert not results.stale and len(results.finished) == len(list(folder.glob('runs/*/*/*.json'))) > 20
    report(results, tmp_path, Console(file=io.StringIO()))
    for file in ('table.md', 'search.md', 'results.csv'):
        assert (tmp_path / file).read_text() == (folder / file).read_text(), file
    lines = (folder / 'table.md').read_text().split('\n\n', 1)[1]
    assert lines in (ROOT / 'docs' / f'{page}.md').read_text(encoding='utf-8')
    shown = sorted((ROOT / 'docs' / 'comparison' / name).iterdir())
    assert [path.name for path in shown] == ['curves.png', 'search.md', 'tradeoff.png']
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in shown)
