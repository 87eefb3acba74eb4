"""The README's code runs; only what would be downloaded is left out. Its links are absolute, and lead somewhere."""

import re

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config

from iconformer_mm.engine import load_config

README = (ROOT / 'README.md').read_text(encoding='utf-8')
PROJECT = r'https://(?:github\.com/[\w-]+/iconformer_mm/blob|raw\.githubusercontent\.com/[\w-]+/iconformer_mm)/main/'


def blocks(kind):
    return re.findall(rf'```{kind}\n(.*?)```', README, re.DOTALL)


def test_every_python_block_has_a_test():
    assert len(blocks('python')) == 2


def test_first_adapter(tmp_path, monkeypatch, capsys):
    pytest.importorskip('timm')
    code = blocks('python')[0]
    assert len([line for line in code.splitlines() if line]) == 10
    code = code.replace('pretrained=True', 'pretrained=False')
    # Two downloads of the same weights are two models made from the same seed.
    code = re.sub(r'^(\w+ = timm)', r'torch.manual_seed(0); \1', code, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    count = 12 * (2 * 384 * 64 + 64 + 384 + 64 * 64 * 9 + 2 * 64 * 9)  # projections, generator, FilterNorm
    assert f'{count:,}' in capsys.readouterr().out
    trained = sum(p.numel() for group in scope['optimizer'].param_groups for p in group['params'])
    assert trained == count + 384 * 200 + 200
    assert (tmp_path / 'birds.safetensors').stat().st_size < 5 * 2**20
    torch.manual_seed(0)
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(scope['model'].eval()(images), scope['fresh'].eval()(images))


def test_two_lines_for_a_config(tmp_path):
    pytest.importorskip('mmpretrain')
    path = tmp_path / 'config.py'
    path.write_text(blocks('python')[1])
    cfg = load_config(str(path))
    assert isinstance(cfg, Config) and cfg.custom_hooks[0].method.bottleneck == 64
    assert cfg.model.backbone.type == 'SwinTransformer'


def test_links():
    """An index page shows the README without the repository, so no link may be relative."""
    links = re.findall(r'\]\(([^)\s]+)\)', README)
    assert all(link.startswith('https://') for link in links), links
    ours = [re.sub(PROJECT, '', link) for link in links if re.match(PROJECT, link)]
    assert len(ours) > 15
    for link in ours:
        file, _, anchor = link.partition('#')
        assert (ROOT / file).exists(), link
        if anchor:
            headings = re.findall(r'^#+ (.*)$', (ROOT / file).read_text(encoding='utf-8'), re.MULTILINE)
            assert anchor in {re.sub(r'[^\w\- ]', '', h.lower()).strip().replace(' ', '-') for h in headings}, link


def test_length():
    """It is read to the end: 900 words, code and tables included."""
    assert len(README.split()) <= 900


def test_scripts_that_are_named():
    scripts = set(re.findall(r'\b(tools/[\w/]+\.(?:sh|py))', README))
    assert {'tools/quickstart.sh', 'tools/run_tests.sh'} <= scripts
    for path in scripts:
        assert (ROOT / path).is_file(), path
    assert [b for b in blocks('bash') if 'quickstart' in b] == ['bash tools/quickstart.sh\n']
    assert [b for b in blocks('bash') if 'run_tests' in b] == ['bash tools/run_tests.sh\n']
