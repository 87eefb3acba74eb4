"""The recipes that adapt more than a backbone: their shares, and two iterations, narrowed, on rendered scenes."""

import copy
import uuid

import numpy as np
import pytest
import torch
from benchmark_runs import two_iterations, write_scenes
from conftest import ROOT
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from small_bert import write_bert
from small_detectors import repair_grounding_dino

from iconformer_mm import inject, summarize
from iconformer_mm.analysis.inspection import find_mistakes, inspect_model
from iconformer_mm.checkpoint import read_adapter
from iconformer_mm.datasets.scenes import SHAPES
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import method_of
from iconformer_mm.tuning.accounting import WeightsError
from iconformer_mm.tuning.freezing import is_adapter

RECIPES = sorted(path.stem for path in (ROOT / 'configs' / 'towers').glob('*.py'))
DINO = 'dino-5scale_swin-l_icon-lora_coco'


def recipe(name):
    cfg = load_config(str(ROOT / 'configs' / 'towers' / f'{name}.py'))
    init_default_scope(cfg.default_scope)
    return cfg


def test_there_are_recipes():
    assert RECIPES == [
        'dino-5scale_swin-l_full_coco',
        DINO,
        'grounding-dino_swin-t_full_coco',
        'grounding-dino_swin-t_icon-lora_coco',
        'grounding-dino_swin-t_lora_coco',
    ]
    for name in RECIPES:
        cfg = recipe(name)
        assert cfg.custom_imports.imports == ['iconformer_mm'] and find_mistakes(cfg, data=False) == []


def test_shares_of_dino():
    """Of the whole encoder and decoder; the backbone's is that of other recipes with Swin-L."""
    cfg = recipe(DINO)
    cfg.model.backbone.update(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], init_cfg=None)
    cfg.model.neck.in_channels = [8, 16, 32, 64]
    summary = inject(MODELS.build(cfg.model), **method_of(cfg))
    rank, width, ffn = 16, 256, 2048
    sampling = (8 * 5 * 4 * 2, 8 * 5 * 4, width)  # offsets, weights and values of 8 heads, 5 levels and 4 points
    deformable = rank * sum(width + outputs for outputs in sampling)
    both = 2 * rank * (width + ffn)
    assert summary.towers['encoder'].trained == 6 * (deformable + both) == 586_752
    assert summary.towers['decoder'].trained == 6 * (2 * rank * 2 * width + deformable + both) == 685_056
    assert [tower.method for tower in summary.towers.values()] == ['icon', 'lora', 'lora']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes'))


def narrow(cfg):
    """The same detector with 32 channels, or the 256 that Grounding DINO is written for, and two layers."""
    model = cfg.model
    width = 32 if model.type == 'DINO' else 256
    model.backbone.update(embed_dims=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4)
    model.backbone.update(init_cfg=None, drop_path_rate=0.0, pretrain_img_size=64)
    model.neck.update(in_channels=[8, 16, 32, 64][-len(model.neck.in_channels) :], out_channels=width)
    model.neck.norm_cfg.num_groups = 8
    attention, ffn = dict(embed_dims=width, num_heads=4), dict(embed_dims=width, feedforward_channels=48)
    for part in (model.encoder, model.decoder):
        part.num_layers = 2
        for key, layer in part.items():
            if key.endswith('layer_cfg') and key != 'fusion_layer_cfg':
                for name in layer:
                    layer[name].update(ffn if name == 'ffn_cfg' else attention)
    if 'fusion_layer_cfg' in model.encoder:
        model.encoder.fusion_layer_cfg.update(v_dim=width, l_dim=width, embed_dim=32, num_heads=2)
    model.positional_encoding.num_feats = width // 2
    model.num_queries = 10
    model.dn_cfg.group_cfg.num_dn_queries = 10
    model.bbox_head.update(embed_dims=width)
    if model.type == 'DINO':
        model.bbox_head.num_classes = len(SHAPES)
    model.test_cfg.max_per_img = 10


def run(cfg, **changes):
    cfg = copy.deepcopy(cfg)
    cfg.update(**changes, experiment_name=uuid.uuid4().hex, visualizer=None)
    return Runner.from_cfg(cfg)


@pytest.fixture(scope='module')
def base(data, tmp_path_factory):
    """A detector that was not adapted, as pre-trained weights."""
    cfg = recipe(DINO)
    narrow(cfg)
    path = tmp_path_factory.mktemp('base') / 'base.pth'
    model = MODELS.build(cfg.model)
    torch.manual_seed(0)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.mark.filterwarnings('ignore')
def test_dino_trains_resumes_and_tests(data, base, tmp_path):
    cfg = recipe(DINO)
    narrow(cfg)
    cfg = two_iterations(cfg, data, tmp_path)
    runner = run(cfg, load_from=str(base))
    runner.train()
    summary = summarize(runner.model)
    assert {path: tower.method for path, tower in summary.towers.items()} == dict(
        backbone='icon', encoder='lora', decoder='lora'
    )
    before, after = torch.load(base, weights_only=True)['state_dict'], runner.model.state_dict()
    moved = {n for n in after if n not in before or not torch.equal(before[n], after[n])}
    assert {n for n in moved if n.startswith(('backbone.', 'encoder.', 'decoder.'))} <= set(filter(is_adapter, moved))
    for place in ('backbone.', 'encoder.', 'decoder.', 'bbox_head.', 'neck.'):
        assert any(n.startswith(place) for n in moved)
    content, _ = read_adapter(tmp_path / 'adapter.safetensors')
    assert content['backbones'] == ['backbone', 'encoder', 'decoder']

    cfg.train_cfg.max_iters = 3
    resumed = run(cfg, load_from=f'{tmp_path}/iter_2.pth', resume=True)
    resumed.train()
    assert resumed.iter == 3
    results = run(cfg, load_from=f'{tmp_path}/iter_3.pth').test()
    assert np.isfinite(results['coco/bbox_mAP'])


@pytest.mark.filterwarnings('ignore')
def test_a_frozen_head_for_new_classes_is_refused(data, base, tmp_path):
    cfg = recipe(DINO)
    narrow(cfg)
    cfg.custom_hooks[0]['freeze'] = ['bbox_head', 'neck']
    cfg = two_iterations(cfg, data, tmp_path)
    state = torch.load(base, weights_only=True)['state_dict']
    other = {n: torch.cat((v, v[:1])) if 'cls_branches' in n else v for n, v in state.items()}  # of one more class
    torch.save(dict(state_dict=other), tmp_path / 'other.pth')
    with pytest.raises(WeightsError, match='A head for other classes must be trained: take it out of `freeze`'):
        run(cfg, load_from=str(tmp_path / 'other.pth')).train()


def test_inspection_names_the_towers(data):
    cfg = recipe(DINO)
    narrow(cfg)
    inspection = inspect_model(cfg, (64, 64))
    text = str(inspection.summary)
    assert 'backbone: icon, ' in text and 'encoder: lora, ' in text and 'decoder: lora, ' in text
    assert any(name.startswith('decoder.layers.0.cross_attn') for name, *_ in inspection.sites)
    assert inspection.cost.gflop > 0 and inspection.cost.gradient_mib > 0


@pytest.mark.parametrize('name', [n for n in RECIPES if n.startswith('grounding')])
@pytest.mark.filterwarnings('ignore')
def test_grounding_dino_trains_and_tests(name, data, tmp_path):
    pytest.importorskip('transformers', reason='the text encoder is that of transformers (extra "text")')
    repair_grounding_dino()
    cfg = recipe(name)
    cfg.model.language_model.name = write_bert(tmp_path / 'bert')
    narrow(cfg)
    cfg = two_iterations(cfg, data, tmp_path / 'run')
    model = MODELS.build(copy.deepcopy(cfg.model))
    torch.manual_seed(0)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'base.pth')
    runner = run(cfg, load_from=str(tmp_path / 'base.pth'))
    runner.train()
    if 'full' not in name:
        trained = {n for n, p in runner.model.named_parameters() if p.requires_grad}
        assert trained and all(map(is_adapter, trained))
        assert len(summarize(runner.model).towers) == 4
    results = run(cfg, load_from=f'{tmp_path}/run/iter_2.pth').test()
    assert np.isfinite(results['coco/bbox_mAP'])
