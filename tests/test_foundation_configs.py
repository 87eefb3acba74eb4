"""The recipes for foundation models: what they train, and two iterations of each, narrowed, on generated data."""

import uuid

import numpy as np
import pytest
import torch
from benchmark_runs import check_training_and_test, narrow_mask2former, two_iterations, write_scenes
from conftest import ROOT
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from iconformer_mm import inject, summarize
from iconformer_mm.analysis.inspection import find_mistakes
from iconformer_mm.datasets.scenes import SHAPES
from iconformer_mm.engine import add_peft, load_config
from iconformer_mm.engine.config import names_weights

RECIPES = sorted(path.stem for path in (ROOT / 'configs' / 'foundation').glob('*.py'))
# Parameters of the backbone, and the share of it that iCoN trains, in percent.
SIZES = {
    'dinov2-small': (22_056_576, 4.6),
    'dinov2-base': (86_580_480, 1.9),
    'dinov2-large': (304_368_640, 1.34),
    'dinov3-small': (21_601_152, 4.87),
    'dinov3-base': (85_660_416, 1.92),
    'dinov3-large': (303_129_600, 1.35),
    'eva02-large': (303_272_960, 1.35),
    'siglip-base': (85_797_120, 1.92),
}


def recipe(name):
    cfg = load_config(str(ROOT / 'configs' / 'foundation' / f'{name}.py'))
    init_default_scope(cfg.default_scope)
    return cfg


def test_there_are_recipes():
    assert len(RECIPES) == 19 and {name.rpartition('_')[0].partition('_')[0] for name in RECIPES} == set(SIZES)


@pytest.mark.parametrize('name', RECIPES)
def test_sizes_and_shares(name):
    cfg = recipe(name)
    assert names_weights(cfg.model) and find_mistakes(cfg) == []
    assert cfg.custom_imports.imports == ['iconformer_mm']
    with torch.device('meta'):  # of whole size, without memory
        backbone = MODELS.build({k: v for k, v in cfg.model.backbone.items() if k != 'init_cfg'})
        whole = sum(p.numel() for p in backbone.parameters())
        summary = inject(backbone, 'icon')
    size, share = SIZES[name.partition('_')[0]]
    assert abs(whole / size - 1) < 0.01
    assert abs(100 * summary.backbone_share / share - 1) < 0.05


def write_food(root):
    """Food-101's layout, with noise for dishes."""
    from mmpretrain.datasets.categories import FOOD101_CATEGORIES as dishes

    (root / 'meta').mkdir(parents=True)
    names = []
    for number, dish in enumerate(dishes[:2]):
        (root / 'images' / dish).mkdir(parents=True)
        for index in range(2):
            pixels = np.random.RandomState(10 * number + index).randint(0, 255, (60, 80, 3), np.uint8)
            Image.fromarray(pixels).save(root / 'images' / dish / f'{index}.jpg')
            names.append(f'{dish}/{index}')
    for split in ('train', 'test'):
        (root / 'meta' / f'{split}.txt').write_text('\n'.join(names) + '\n')
    return root


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = write_scenes(tmp_path_factory.mktemp('scenes'))
    write_food(root / 'food-101')
    return root


def narrow(cfg):
    """The same model with four blocks of 32 channels."""
    model, backbone = cfg.model, cfg.model.backbone
    heads = 2
    width = 32
    if backbone.type == 'VisionTransformer':
        backbone.pop('init_cfg')
        backbone.arch = dict(embed_dims=width, num_layers=4, num_heads=heads, feedforward_channels=64)
    else:
        backbone.update(pretrained=False, checkpoint=None)
        size = dict(embed_dim=width, depth=4, num_heads=heads, mlp_ratio=2)
        backbone.model_kwargs = {**(backbone.get('model_kwargs') or {}), **size}
        if len(backbone.get('out_indices') or ()) == 4:
            backbone.out_indices = (0, 1, 2, 3)
    neck = model.get('neck')
    if neck is not None and 'in_channels' in neck:
        neck.in_channels = width
    if neck is not None and neck.type == 'ViTPyramid':
        neck.out_channels = (16, 32, 64, 128)
    if model.type == 'ImageClassifier':
        both = neck is not None and backbone.get('prefix_tokens') == 'cls'
        model.head.in_channels = 2 * width if both else width
    elif model.type == 'MaskRCNN':
        model.roi_head.bbox_head.update(fc_out_channels=32, num_classes=len(SHAPES))
        model.roi_head.mask_head.update(conv_out_channels=32, num_classes=len(SHAPES))
        model.train_cfg.rcnn.sampler.num = 32
        model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=20)  # untrained scores are low
    elif 'panoptic_head' in model:
        narrow_mask2former(model.panoptic_head)
        classes = dict(num_things_classes=len(SHAPES))
        model.panoptic_head.update(**classes, loss_cls=dict(class_weight=[1.0] * len(SHAPES) + [0.1]))
        model.panoptic_fusion_head.update(classes)
        model.data_preprocessor.batch_augments[0].size = (204, 204)
        model.train_cfg.num_points = 128
        model.test_cfg.max_per_image = 20
    elif model.decode_head.type == 'Mask2FormerHead':
        narrow_mask2former(model.decode_head)
        model.decode_head.train_cfg.num_points = 128
    elif model.decode_head.type == 'LinearBNHead':
        model.decode_head.in_channels = width
    elif model.decode_head.type == 'UPerHead':
        model.decode_head.update(in_channels=[16, 32, 64, 128], channels=16)
    else:
        model.decode_head.update(embed_dims=width, channels=16, post_process_channels=[8, 16, 32, 32])


def food(cfg, data, work_dir):
    """Two iterations of classification."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        cfg[name].update(num_workers=0, persistent_workers=False, batch_size=2)
        cfg[name].dataset.data_root = str(data / 'food-101')
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=cfg.optim_wrapper.optimizer)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=2)
    cfg.log_processor = dict(by_epoch=False)
    cfg.update(work_dir=str(work_dir), experiment_name=uuid.uuid4().hex, log_level='WARNING', randomness=dict(seed=0))
    return cfg


METRICS = {'food101': 'accuracy/top1', 'coco': 'coco/segm_mAP', 'nyu': 'rmse'}
METHODS = ('icon', 'adaptformer', 'frozen', 'lora', 'full')


@pytest.mark.parametrize('name', [n for n in RECIPES if 'large' not in n or 'mask2former' in n or 'eva' in n])
@pytest.mark.filterwarnings('ignore')
def test_trains_two_iterations_and_tests(name, data, tmp_path):
    """Narrowed, the large models are the base ones."""
    cfg = recipe(name)
    # One method each: what a method does to a family is tested for all of both elsewhere.
    method = METHODS[RECIPES.index(name) % 3]
    add_peft(cfg, method)
    narrow(cfg)
    task = name.rpartition('_')[2].partition('-')[0]
    cfg = food(cfg, data, tmp_path) if task == 'food101' else two_iterations(cfg, data, tmp_path)
    check_training_and_test(cfg, method, METRICS.get(task, 'mIoU'))


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
    'name', ['dinov2-base_mask-rcnn_coco', 'dinov2-base_dpt_nyu', 'dinov2-base_upernet_ade20k-512x512']
)
def test_composes_with_the_method_files(name, method, tmp_path):
    base = ROOT / 'configs'
    path = tmp_path / 'recipe.py'
    path.write_text(f"_base_ = ['{base}/foundation/{name}.py', '{base}/_base_/peft/{method}.py']\n")
    cfg = load_config(str(path))
    init_default_scope(cfg.default_scope)
    narrow(cfg)
    model = MODELS.build(cfg.model)
    for hook in cfg.get('custom_hooks', []):
        inject(model, hook.method)
    summary = summarize(model)
    assert (summary.method or 'full') == method
    if method == 'full':
        assert summary.backbone_share == 1
    else:
        assert summary.parts['backbone'] == (0, summary.backbone)
