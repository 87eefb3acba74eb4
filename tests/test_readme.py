"""The README's code runs; only what would be downloaded is left out."""

import re

import cv2
import numpy as np
import torch
from conftest import ROOT
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope

import iconformer_mm  # noqa: F401
from iconformer_mm import inject, save_adapter, summarize
from iconformer_mm.engine import load_config

README = (ROOT / 'README.md').read_text(encoding='utf-8')

HEADINGS = ('**1. With a hook', '**2. With a backbone', '**3. In Python', '## Predict')  # tested here, in this order


def block(heading):
    """The first Python block after a bold heading."""
    return re.search(re.escape(heading) + r'.*?```python\n(.*?)```', README, re.DOTALL).group(1)


def test_with_a_hook(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(block(HEADINGS[0]))
    cfg = load_config(str(path))
    assert isinstance(cfg, Config) and cfg.custom_hooks[0].method.bottleneck == 64
    assert cfg.model.backbone.type == 'SwinTransformer'


def test_with_a_backbone():
    scope = {}
    exec(block(HEADINGS[1]), scope)
    scope['model']['backbone'].pop('init_cfg')
    model = MODELS.build(ConfigDict(scope['model']))
    optim_wrapper = build_optim_wrapper(model, ConfigDict(scope['optim_wrapper']))
    count = sum(p.numel() for group in optim_wrapper.param_groups for p in group['params'])
    assert count == summarize(model).trainable == 2_466_048 + 1024 * 100 + 100


def test_in_python(tmp_path, monkeypatch, capsys):
    code = block(HEADINGS[2]).replace('pretrained=True', 'pretrained=False')
    # Two downloads of the same weights are two models made from the same seed.
    code = re.sub(r'^(\w+ = get_model)', r'torch.manual_seed(0); \1', code, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(code, dict(torch=torch))
    printed = capsys.readouterr().out
    assert '2,466,048' in printed and 'PEFT method: none' in printed
    assert (tmp_path / 'birds.safetensors').stat().st_size < 12 * 2**20


def test_predict(tmp_path, monkeypatch):
    """The block about prediction, with files of its names, small."""
    monkeypatch.chdir(tmp_path)
    digits = ROOT / 'configs' / 'quickstart' / 'vit-quickstart_icon_digits.py'
    (tmp_path / 'config.py').write_text(f"_base_ = '{digits}'\n")
    cfg = load_config(str(digits))
    init_default_scope('mmpretrain')
    model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict()), 'swin_base.pth')
    inject(model)
    for name in ('birds', 'dogs'):
        save_adapter(model, f'{name}.safetensors')
    cv2.imwrite('photo.jpg', np.zeros((40, 30, 3), np.uint8))
    scope = {}
    exec(block(HEADINGS[3]), scope)
    assert scope['inferencer'].adapters == ['birds', 'dogs']


def test_scripts_that_are_named():
    for path in set(re.findall(r'\b(tools/[\w/]+\.(?:sh|py))', README)):
        assert (ROOT / path).is_file(), path
