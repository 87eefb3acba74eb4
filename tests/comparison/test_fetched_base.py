"""Comparisons on the real base, which is fetched: here a stand-in of the same names."""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from iconformer_mm import inject
from iconformer_mm.comparison import spec
from iconformer_mm.comparison.single_run import check_frozen_weights, make_config
from iconformer_mm.comparison.spec import ComparisonError, load_comparison
from iconformer_mm.datasets.objects import BACKGROUND
from iconformer_mm.datasets.photographs import CATEGORIES
from iconformer_mm.engine import load_config
from iconformer_mm.models.timm_features import TIMMFeatures

YAML = ROOT / 'configs' / 'comparison' / 'dinov2_scenes.yaml'


def test_its_path_is_in_no_settings(tmp_path, monkeypatch):
    """Caches lie in other places on other machines, and results stay valid."""
    monkeypatch.setattr(spec, 'fetch_base', lambda target: tmp_path / f'{target}.safetensors')
    comparison = load_comparison(YAML)
    (run,) = comparison.runs(comparison.tasks['depth'], comparison.methods['icon'], 1e-3)
    assert run.settings['base'] == 'fetched:timm' and str(tmp_path) not in str(run.settings)
    assert run.task.base_file() == tmp_path / 'timm.safetensors'
    cfg = make_config(run.settings, run.task.base_file(), tmp_path)
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=str(tmp_path / 'timm.safetensors'))
    other = replace(run, task=replace(run.task, base='base.pth'))
    assert 'base' not in other.settings and other.task.base_file() == ROOT / 'base.pth'


def test_methods_of_an_imported_module(tmp_path, monkeypatch, import_methods):
    """A task may import the module that registers a method."""
    monkeypatch.setattr(spec, 'fetch_base', lambda target: tmp_path / f'{target}.safetensors')
    comparison = load_comparison(YAML.parent / 'generator.yaml')
    (run, *_) = comparison.runs(comparison.tasks['mixture'], comparison.methods['class_sees'], 1e-3)
    cfg = make_config(run.settings, run.task.base_file(), tmp_path)
    assert cfg.default_hooks.peft.method == dict(type='icon-variant', class_sees=True)


def test_an_unknown_target(tmp_path):
    text = YAML.read_text().replace('../', f'{YAML.parent.parent}/').replace('fetched:timm', 'fetched:tim')
    (tmp_path / 'c.yaml').write_text(text)
    with pytest.raises(ComparisonError, match="tasks.semantic.base: unknown target 'tim' .did you mean 'timm'"):
        load_comparison(tmp_path / 'c.yaml')


def test_frozen_weights_of_a_wrapped_model(tmp_path):
    """The base has the names of the model within."""
    small = dict(depth=1, embed_dim=32, num_heads=2, img_size=28)
    model = torch.nn.Module()
    model.backbone = TIMMFeatures('vit_small_patch14_dinov2', model_kwargs=small)
    save_file(model.backbone.timm_model.state_dict(), tmp_path / 'base.safetensors')
    inject(model, 'adaptformer')
    assert check_frozen_weights(model, tmp_path / 'base.safetensors')
    with torch.no_grad():
        model.backbone.timm_model.cls_token.add_(1)
    with pytest.raises(RuntimeError, match='frozen tensor backbone.timm_model.cls_token changed in training'):
        check_frozen_weights(model, tmp_path / 'base.safetensors')


def test_configs_of_objects_have_the_categories_that_are_written():
    folder = ROOT / 'configs' / 'comparison' / 'real'
    semantic = load_config(str(folder / 'upernet_dinov2_objects.py'))
    instance = load_config(str(folder / 'mask-rcnn_dinov2_objects.py'))
    for part in ('train', 'val', 'test'):
        assert semantic[f'{part}_dataloader'].dataset.metainfo.classes == (BACKGROUND, *CATEGORIES)
        assert instance[f'{part}_dataloader'].dataset.metainfo.classes == tuple(CATEGORIES)
    assert semantic.model.decode_head.num_classes == len(CATEGORIES) + 1
    heads = instance.model.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == len(CATEGORIES)
