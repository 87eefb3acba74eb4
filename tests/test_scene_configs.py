"""Every scene config trains, resumes and tests on scenes."""

import copy
import uuid

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.registry import MODELS, init_default_scope
from safetensors.torch import load_file

from iconformer_mm import summarize
from iconformer_mm.datasets.scenes import CLASSES, SHAPES, WRITERS, scenes
from iconformer_mm.engine import build_runner, load_config

FOLDER = ROOT / 'configs' / 'scenes'
BASE = FOLDER / 'swin-scenes_source.safetensors'
TASKS = {
    'upernet_swin-scenes': ('ade20k', 'mIoU'),
    'mask-rcnn_swin-scenes_fpn': ('coco', 'coco/segm_mAP'),
    'depth_swin-scenes': ('nyu', 'rmse'),
}
METHODS = ('icon', 'adaptformer', 'frozen', 'full')
# The comparison's own configs, whose methods tools/compare.py sets.
COMPARED = {
    '../comparison/semantic_swin-scenes': ('ade20k', 'mIoU'),
    '../comparison/instance_swin-scenes': ('coco', 'coco/segm_mAP'),
    '../comparison/dino_swin-scenes': ('coco', 'coco/bbox_mAP'),
}
RUNS = [(task, method) for task in TASKS for method in METHODS] + [(task, 'full') for task in COMPARED]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('scenes')
    for kind, _ in TASKS.values():
        for split in ('train', 'val'):
            WRITERS[kind](root / kind, split, scenes(4, 0, 'target'))
    return root


def small_config(task, method, data, work_dir, iterations):
    cfg = load_config(str(FOLDER / f'{task}_{method}_target.py'))
    kind, _ = (TASKS | COMPARED)[task]
    for part in ('train', 'val', 'test'):
        cfg[f'{part}_dataloader'].dataset.data_root = str(data / kind)
        if kind == 'coco' and part != 'train':
            cfg[f'{part}_evaluator'].ann_file = str(data / 'coco' / 'annotations' / 'instances_val2017.json')
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.update(max_iters=iterations, val_interval=iterations)
    cfg.default_hooks.checkpoint.interval = 1
    if 'rcnn' in cfg.model.test_cfg:
        cfg.model.test_cfg.rcnn.score_thr = 0.0  # scores are low after four iterations
    cfg.update(work_dir=str(work_dir), experiment_name=uuid.uuid4().hex, log_level='WARNING', visualizer=None)
    return cfg


@pytest.mark.parametrize(('task', 'method'), RUNS)
@pytest.mark.filterwarnings('ignore')
def test_trains_resumes_and_tests(task, method, data, tmp_path):
    metric = (TASKS | COMPARED)[task][1]
    build_runner(small_config(task, method, data, tmp_path, 2)).train()
    cfg = small_config(task, method, data, tmp_path, 3)
    cfg.update(resume=True, load_from=None)
    runner = build_runner(copy.deepcopy(cfg))
    runner.train()
    assert runner.iter == 3
    assert (summarize(runner.model).method or 'full') == method
    scores = {key: value.current() for key, value in runner.message_hub.log_scalars.items() if key.startswith('val/')}
    trained = {name: value.clone() for name, value in runner.model.state_dict().items()}

    if method != 'full':
        kept = {name: value for name, value in load_file(BASE).items() if name in trained}
        assert len(kept) >= 112  # all but norms of stages that the head does not read
        assert all(torch.equal(trained[name], value) for name, value in kept.items())

    cfg = small_config(task, method, data, tmp_path / 'test', 3)
    cfg.load_from = str(tmp_path / 'iter_3.pth')
    runner = build_runner(cfg)
    results = runner.test()
    assert np.isfinite(results[metric]) and results[metric] == pytest.approx(scores[f'val/{metric}'])
    assert all(torch.equal(value, trained[name]) for name, value in runner.model.state_dict().items())


@pytest.mark.parametrize('task', [*TASKS, *COMPARED])
def test_every_model_takes_the_whole_base(task):
    cfg = load_config(str(FOLDER / f'{task}_full_target.py'))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    if cfg.get('load_from') is not None:  # the base is a whole detector
        shapes = {name: value.shape for name, value in load_file(cfg.load_from).items()}
        assert shapes == {name: value.shape for name, value in model.state_dict().items()}
        return
    backbone = model.backbone
    backbone.init_weights()
    base = {name.removeprefix('backbone.'): value for name, value in load_file(BASE).items()}
    state = backbone.state_dict()
    # The norms of stages that a head does not read are not built.
    assert set(state) <= set(base) and {n.split('.')[0] for n in set(base) - set(state)} <= {'norm0', 'norm1', 'norm2'}
    assert all(torch.equal(value, base[name]) for name, value in state.items())


def test_classes_are_the_generators():
    for method in METHODS:
        semantic = load_config(str(FOLDER / f'upernet_swin-scenes_{method}_target.py'))
        instance = load_config(str(FOLDER / f'mask-rcnn_swin-scenes_fpn_{method}_target.py'))
        for part in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            assert semantic[part].dataset.metainfo.classes == CLASSES
            assert instance[part].dataset.metainfo.classes == SHAPES
