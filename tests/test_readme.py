"""The README's code runs; only what would be downloaded is left out."""

import re

import pytest
import torch
from conftest import ROOT
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

import iconformer_mm  # noqa: F401
from iconformer_mm import summarize
from iconformer_mm.apis import load_config

README = (ROOT / 'README.md').read_text(encoding='utf-8')


def block(heading):
    """The first Python block after a bold heading."""
    return re.search(re.escape(heading) + r'.*?```python\n(.*?)```', README, re.DOTALL).group(1)


def test_with_a_hook(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(block('**1. With a hook'))
    cfg = load_config(str(path))
    assert isinstance(cfg, Config) and cfg.custom_hooks[0].method.bottleneck == 64
    assert cfg.model.backbone.type == 'SwinTransformer'


def test_with_a_backbone():
    scope = {}
    exec(block('**2. With a backbone'), scope)
    scope['model']['backbone'].pop('init_cfg')
    model = MODELS.build(ConfigDict(scope['model']))
    optim_wrapper = build_optim_wrapper(model, ConfigDict(scope['optim_wrapper']))
    count = sum(p.numel() for group in optim_wrapper.param_groups for p in group['params'])
    assert count == summarize(model).trainable == 2_466_048 + 1024 * 100 + 100


def test_in_python(tmp_path, monkeypatch, capsys):
    code = block('**3. In Python').replace('pretrained=True', 'pretrained=False')
    # Two downloads of the same weights are two models made from the same seed.
    code = re.sub(r'^(\w+ = get_model)', r'torch.manual_seed(0); \1', code, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(code, dict(torch=torch))
    printed = capsys.readouterr().out
    assert '2,466,048' in printed and 'PEFT method: none' in printed
    assert (tmp_path / 'birds.safetensors').stat().st_size < 12 * 2**20


@pytest.mark.parametrize('path', re.findall(r'\]\(((?!http)[^)#]+)\)', README))
def test_links(path):
    assert (ROOT / path).exists()


def test_scripts_that_are_named():
    for path in set(re.findall(r'\b(tools/[\w/]+\.(?:sh|py))', README)):
        assert (ROOT / path).is_file(), path
