"""Data that does not fit the model is refused before a step, in one sentence; data that fits passes."""

import json
import shutil
import uuid

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from iconformer_mm import add_adapter, set_adapter
from iconformer_mm.analysis.inspection import find_mistakes, unseen_data
from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.fit import DepthRange, Head, Model, class_fault, find_class_list_fault, look_at_model
from iconformer_mm.datasets.scenes import WRITERS, scenes
from iconformer_mm.engine import build_runner, load_config

CONFIGS = {
    'coco': 'scenes/mask-rcnn_swin-scenes_fpn_full_target.py',
    'ade20k': 'scenes/upernet_swin-scenes_full_target.py',
    'nyu': 'scenes/depth_swin-scenes_full_target.py',
    'digits': 'quickstart/vit-quickstart_full_digits.py',
}
PARTS = ('train', 'val', 'test')


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp('sound')
    for kind in ('coco', 'ade20k', 'nyu', 'classification'):
        for split in ('train', 'val'):
            WRITERS[kind](root / kind, split, scenes(4, 0))
    return root


@pytest.fixture
def data(sound, tmp_path):
    """A copy of the data that a test may spoil."""
    shutil.copytree(sound, tmp_path / 'data')
    return tmp_path / 'data'


def config(kind, data, tmp_path, **changes):
    cfg = load_config(str(ROOT / 'configs' / CONFIGS[kind]))
    for part in PARTS:
        if kind != 'digits':
            cfg[f'{part}_dataloader'].dataset.data_root = str(data / kind)
            cfg[f'{part}_dataloader'].num_workers = 0
            cfg[f'{part}_dataloader'].persistent_workers = False
        if kind == 'coco' and part != 'train':
            cfg[f'{part}_evaluator'].ann_file = str(data / 'coco' / 'annotations' / 'instances_val2017.json')
    cfg.update(work_dir=str(tmp_path), experiment_name=uuid.uuid4().hex, log_level='ERROR', visualizer=None)
    cfg.merge_from_dict(changes)
    return cfg


def built(cfg):
    """Everything up to the first step: the loops with their data, as Runner.train and Runner.test build them."""
    runner = build_runner(cfg)
    return runner, runner.train_loop, runner.val_loop, runner.test_loop


def refused(cfg, message):
    """Refused by the runner before a step, and found in the config."""
    found = find_mistakes(cfg)
    assert any(message in sentence for sentence in found), found
    assert not any('\n' in sentence for sentence in found)
    with pytest.raises(DataError) as error:
        built(cfg)
    assert message in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('kind', CONFIGS)
def test_what_fits_passes(kind, sound, tmp_path):
    cfg = config(kind, sound, tmp_path)
    assert find_mistakes(cfg) == [] and unseen_data(cfg) == []
    built(cfg)


def test_looking_changes_no_random_number(sound, tmp_path):
    cfg = config('ade20k', sound, tmp_path)
    runner = build_runner(cfg)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    _ = runner.train_loop
    assert np.array_equal(np.random.get_state()[1], states[0]) and torch.equal(torch.get_rng_state(), states[1])


# Heads and classes.


@pytest.mark.parametrize('number', [3, 9])
@pytest.mark.parametrize(
    ('kind', 'key'),
    [
        ('digits', 'model.head'),
        ('ade20k', 'model.decode_head'),
        ('ade20k', 'model.auxiliary_head'),
        ('coco', 'model.roi_head.bbox_head'),
        ('coco', 'model.roi_head.mask_head'),
    ],
)
def test_a_head_for_other_classes(kind, key, number, sound, tmp_path):
    cfg = config(kind, sound, tmp_path)
    if cfg.model.get('auxiliary_head') is None and 'auxiliary' in key:
        cfg.model.auxiliary_head = dict(cfg.model.decode_head, in_index=3, type='FCNHead', in_channels=128)
        cfg.model.auxiliary_head.pop('pool_scales', None)
    cfg.merge_from_dict({f'{key}.num_classes': number})
    name, count = key.removeprefix('model.'), dict(digits=10, ade20k=7, coco=5)[kind]
    refused(cfg, f'{name} is for {number} classes, but ')
    sentence = find_mistakes(cfg)[0]
    assert f'has {count} (' in sentence and f'set num_classes={count} in {key}' in sentence


def test_one_of_the_heads_of_a_cascade():
    cfg = load_config('mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco')
    cfg.model.backbone.init_cfg = None
    cfg.model.roi_head.bbox_head[1].num_classes = 3
    init_default_scope('mmdet')
    for model in (cfg.model, MODELS.build(cfg.model)):
        found = class_fault(look_at_model(model), dict(type='D'), dict(classes=[str(i) for i in range(80)]))
        assert found.startswith('roi_head.bbox_head.1 is for 3 classes, but D() has 80')
        assert found.endswith('set num_classes=80 in model.roi_head.bbox_head.1')


@pytest.mark.parametrize(
    ('name', 'heads', 'count'),
    [
        ('mmdet::detr/detr_r50_8xb2-150e_coco', ['bbox_head'], 80),
        ('mmdet::retinanet/retinanet_r50_fpn_1x_coco', ['bbox_head'], 80),
        ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco', ['roi_head.bbox_head'], 80),  # no rpn_head
        ('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco', ['panoptic_head'], 80),
        ('mmdet::htc/htc_r50_fpn_1x_coco', None, 80),  # no semantic_head
        (
            'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024',
            ['decode_head', 'auxiliary_head.0', 'auxiliary_head.1'],
            19,
        ),
        ('mmpretrain::resnet/resnet18_8xb32_in1k', ['head'], 1000),
        ('mmpretrain::mae/mae_vit-base-p16_8xb512-amp-coslr-300e_in1k', [], None),
    ],
)
def test_heads_that_count_classes(name, heads, count):
    found = look_at_model(load_config(name).model).heads
    assert heads is None or [head.name for head in found] == heads
    assert {head.num_classes for head in found} == ({count} if count else set())


def test_heads_that_fit_by_other_counts():
    two = dict(classes=('a', 'b'))
    assert class_fault(Model((Head('decode_head', 1, one_channel=True),)), dict(type='D'), two) is None
    assert 'is for 1 classes' in class_fault(Model((Head('decode_head', 1),)), dict(type='D'), two)
    panoptic = dict(classes='abcde', thing_classes='abc', stuff_classes='de')
    panoptic['classes'] = tuple('abcde')
    heads = Model((Head('bbox_head', 3), Head('x_head', 3), Head('panoptic_head', 5)))
    assert class_fault(heads, dict(type='D'), panoptic) is None
    assert class_fault(Model((Head('bbox_head', 4),)), dict(type='D'), panoptic) is not None
    sigmoid = dict(decode_head=dict(type='FCNHead', num_classes=1, loss_decode=dict(type='L', use_sigmoid=True)))
    assert look_at_model(sigmoid).heads == (Head('decode_head', 1, one_channel=True),)


SMALL = dict(arch=dict(embed_dims=32, num_layers=1, num_heads=2, feedforward_channels=64), img_size=32)


def test_heads_of_inactive_adapters_are_for_other_data():
    init_default_scope('mmpretrain')
    head = dict(type='LinearClsHead', in_channels=32, num_classes=4)
    model = MODELS.build(dict(type='ImageClassifier', backbone=dict(type='VisionTransformer', **SMALL), head=head))
    add_adapter(model, 'birds', 'adaptformer')
    add_adapter(model, 'cars', 'adaptformer', parts=dict(head={**head, 'num_classes': 9}))
    assert [each.num_classes for each in look_at_model(model).heads] == [4]
    set_adapter(model, 'cars')
    assert [each.num_classes for each in look_at_model(model).heads] == [9]


def test_prompts_and_tracks_have_no_classes_of_the_data():
    head = dict(type='H', num_classes=256)
    assert look_at_model(dict(language_model=dict(type='B'), bbox_head=head)).heads == ()
    assert look_at_model(dict(tracker=dict(type='B'), detector=dict(bbox_head=head))).heads == ()


@pytest.mark.parametrize('kind', ['digits', 'ade20k', 'coco'])
@pytest.mark.parametrize('part', PARTS)
def test_a_name_where_a_tuple_is_meant(kind, part, sound, tmp_path):
    cfg = config(kind, sound, tmp_path)
    cfg[f'{part}_dataloader'].dataset.metainfo = dict(classes=('disc'))  # noqa: UP034
    refused(cfg, "are the word 'disc', whose letters would be taken for classes: a tuple of one name needs a comma, ")


def test_lists_of_classes(tmp_path):
    assert 'is not a name' in find_class_list_fault(dict(type='D', metainfo=dict(classes=[1, 2])))
    assert 'empty' in find_class_list_fault(dict(type='D', classes=[]))
    assert "the word 'ab'" in find_class_list_fault(
        dict(type='C', datasets=[dict(type='D'), dict(type='D', classes='ab')])
    )
    assert "the word 'ab'" in find_class_list_fault(dict(type='R', dataset=dict(type='D', metainfo=dict(classes='ab'))))
    assert find_class_list_fault(dict(type='D', classes=('disc',), metainfo=dict(classes=['a', 'b']))) is None
    (tmp_path / 'names.txt').write_text('a\nb\n')
    assert find_class_list_fault(dict(type='D', classes=str(tmp_path / 'names.txt'))) is None


@pytest.mark.parametrize('change', ['order', 'number', 'name'])
def test_validation_with_other_classes_than_training(change, sound, tmp_path):
    cfg = config('coco', sound, tmp_path)
    names = list(cfg.train_dataloader.dataset.metainfo.classes)
    changed = dict(order=names[::-1], number=names[:4], name=[*names[:4], 'star'])[change]
    cfg.val_dataloader.dataset.metainfo.classes = tuple(changed)
    message = {
        'order': "has 'cross' for class 0, but the training data has 'disc'",
        'number': 'has 4 classes, but the training data has 5',
        'name': "has 'star' for class 4, but the training data has 'cross'",
    }[change]
    refused(cfg, message)


def test_a_class_that_the_annotations_do_not_know(sound, tmp_path):
    cfg = config('coco', sound, tmp_path)
    for part in PARTS:
        cfg[f'{part}_dataloader'].dataset.metainfo.classes = ('disc', 'bocks', 'cone', 'diamond', 'cross')
    refused(cfg, 'its annotation file knows 4 of the 5 classes disc, bocks, cone, diamond, cross')


def test_wrappers_are_looked_into(sound, tmp_path):
    cfg = config('ade20k', sound, tmp_path)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(
        type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[inner])
    )
    assert find_mistakes(cfg) == []
    built(cfg)
    cfg.model.decode_head.num_classes = 3
    cfg.experiment_name = uuid.uuid4().hex
    refused(cfg, 'decode_head is for 3 classes, but BaseSegDataset(')


@pytest.mark.parametrize('kind', ['digits', 'nyu'])
def test_the_hook_looks_under_the_stock_runner(kind, sound, tmp_path):
    """As the libraries' own tools start it."""
    from mmengine.runner import Runner

    changes = {'digits': {'model.head.num_classes': 3}, 'nyu': {'model.decode_head.max_depth': 3.0}}[kind]
    cfg = config(kind, sound, tmp_path, **changes)
    cfg.custom_hooks = [dict(type='PEFTHook', method='frozen')]
    for part in PARTS:
        cfg[f'{part}_dataloader'].setdefault(
            'collate_fn', dict(type='default_collate' if kind == 'digits' else 'pseudo_collate')
        )
    init_default_scope(cfg.default_scope)
    with pytest.raises(DataError, match='head is for 3 classes' if kind == 'digits' else 'lies beyond 3 m'):
        Runner.from_cfg(cfg).train()


# Labels of images.


def folders(sound, tmp_path, **options):
    cfg = config('digits', sound, tmp_path)
    for part, split in zip(PARTS, ('train', 'val', 'val')):
        loader = cfg[f'{part}_dataloader']
        loader.dataset = dict(
            type='CustomDataset',
            data_root=str(sound / 'classification'),
            data_prefix=split,
            pipeline=[dict(type='LoadImageFromFile', color_type='grayscale'), dict(type='PackInputs')],
            **options,
        )
    cfg.model.head.num_classes = 5
    return cfg


def test_folders_name_their_classes(sound, tmp_path):
    cfg = folders(sound, tmp_path)
    names = sorted(p.name for p in (sound / 'classification' / 'train').iterdir())
    cfg.model.head.num_classes = len(names)
    assert find_mistakes(cfg) == []
    cfg.model.head.num_classes = 2
    refused(cfg, f"head is for 2 classes, but CustomDataset(data_root='{sound}/classification'")


def label_file(sound, tmp_path, labels):
    files = sorted((sound / 'classification' / 'train').rglob('*.jpg'))
    lines = [
        f'{path.relative_to(sound / "classification" / "train")} {labels[i % len(labels)]}'
        for i, path in enumerate(files)
    ]
    (tmp_path / 'labels.txt').write_text('\n'.join(lines))
    cfg = folders(sound, tmp_path, ann_file=str(tmp_path / 'labels.txt'))
    for part in PARTS:
        cfg[f'{part}_dataloader'].dataset.update(data_root='', data_prefix=str(sound / 'classification' / 'train'))
    return cfg


def test_labels_without_names(sound, tmp_path):
    cfg = label_file(sound, tmp_path, range(5))
    assert find_mistakes(cfg) == []
    built(cfg)
    cfg.model.head.num_classes = 3
    cfg.experiment_name = uuid.uuid4().hex
    refused(cfg, 'has the label 3, but head is for 3 classes, 0 to 2')
    cfg.model.head.num_classes = 9
    cfg.experiment_name = uuid.uuid4().hex
    refused(cfg, 'head is for 9 classes, but the largest label of ')


def test_an_accuracy_that_cannot_be_given(sound, tmp_path):
    cfg = config('digits', sound, tmp_path, **{'val_evaluator.topk': (1, 50)})
    refused(cfg, 'Accuracy computes the top-50 accuracy, but head is for 10 classes: set topk=(1,)')


# Label maps.


def change_maps(folder, change):
    for path in sorted(folder.rglob('*.png')):
        cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))


def binary(data, tmp_path, change, reduce_zero_label=False, splits=('training', 'validation'), **changes):
    """The scenes as two classes, background and foreground, in files as a user may have them."""
    for split in splits:
        change_maps(data / 'ade20k' / 'annotations' / split, lambda labels: change((labels > 2).astype(np.uint8)))
    cfg = config('ade20k', data, tmp_path, **changes)
    for part in PARTS:
        cfg[f'{part}_dataloader'].dataset.metainfo = dict(classes=('background', 'shape'), palette=[[0] * 3, [9] * 3])
        cfg[f'{part}_dataloader'].dataset.reduce_zero_label = reduce_zero_label
        for step in cfg[f'{part}_dataloader'].dataset.pipeline:
            if step.type == 'LoadAnnotations':
                step.reduce_zero_label = reduce_zero_label
    for name in ('decode_head', 'auxiliary_head'):
        if cfg.model.get(name) is not None:
            cfg.model[name].num_classes = 2
    return cfg


def test_masks_of_0_and_1_pass(data, tmp_path):
    cfg = binary(data, tmp_path, lambda mask: mask)
    assert find_mistakes(cfg) == []
    built(cfg)


def test_masks_of_0_and_255(data, tmp_path):
    cfg = binary(data, tmp_path, lambda mask: 255 * mask)
    found = refused(cfg, 'hold class 0 (background) and, on ')
    assert '255, which is ignored. Any prediction would score 100 %' in found and '0 and 255 by 255' in found


def test_masks_of_0_and_255_for_validation_only(data, tmp_path):
    cfg = binary(data, tmp_path, lambda mask: mask, splits=['training'])
    change_maps(data / 'ade20k' / 'annotations' / 'validation', lambda labels: 255 * (labels > 2).astype(np.uint8))
    refused(cfg, 'hold class 0 (background) and, on ')


@pytest.mark.parametrize('value', [1, 255])
def test_a_background_that_is_ignored_leaves_one_class(value, data, tmp_path):
    """reduce_zero_label takes the background away."""
    cfg = binary(data, tmp_path, lambda mask: value * mask, reduce_zero_label=True)
    refused(cfg, 'hold class 0 (background) and, on ' if value == 1 else 'hold no class and, on 100% of')


def test_a_value_between(data, tmp_path):
    cfg = binary(data, tmp_path, lambda mask: 128 * mask)
    refused(cfg, 'the label map holds 128, but the data set has 2 classes, 0 to 1, and 255 for ignored pixels')


def test_a_foreground_that_is_rare_is_looked_for(data, tmp_path):
    """One map of many with a foreground is enough, wherever it is."""
    folder = data / 'ade20k'
    image, labels = (next((folder / kind / 'training').iterdir()) for kind in ('images', 'annotations'))
    for number in range(60):
        shutil.copy(image, image.with_name(f'ADE_train_1{number:07d}.jpg'))
        shutil.copy(labels, labels.with_name(f'ADE_train_1{number:07d}.png'))
    change_maps(folder / 'annotations', lambda old: np.where(old < 3, 0, 255).astype(np.uint8))
    cfg = binary(data, tmp_path, lambda mask: mask, splits=[])
    refused(cfg, 'hold class 0 (background) and, on ')
    for split, name in (('training', 'ADE_train_10000037'), ('validation', 'ADE_val_00000002')):
        path = folder / 'annotations' / split / f'{name}.png'
        one = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        one[0, 0] = 1
        cv2.imwrite(str(path), one)
    assert find_mistakes(cfg) == []


def test_a_head_that_ignores_another_label(data, tmp_path):
    cfg = binary(data, tmp_path, lambda mask: np.where(mask > 0, mask, 0).astype(np.uint8))
    for name in ('decode_head', 'auxiliary_head'):
        if cfg.model.get(name) is not None:
            cfg.model[name].ignore_index = 254
    assert find_mistakes(cfg) == []
    change_maps(
        data / 'ade20k' / 'annotations' / 'training', lambda labels: labels + 255 * (labels == 0).astype(np.uint8)
    )
    refused(cfg, 'the label map holds 255, but the data set has 2 classes, 0 to 1, and 254 for ignored pixels')


# Depth.


def test_depth_beyond_the_head(sound, tmp_path):
    cfg = config('nyu', sound, tmp_path, **{'model.decode_head.max_depth': 3.0})
    found = refused(cfg, 'of the known depth lies beyond 3 m, the max_depth of the head, up to ')
    assert '.png' in found


def test_depth_beyond_the_metric(sound, tmp_path):
    cfg = config('nyu', sound, tmp_path, **{'val_evaluator.max_depth_eval': 0.5, 'test_evaluator.max_depth_eval': 0.5})
    found = refused(cfg, 'no depth in the map lies between')
    assert 'all metrics would be NaN' in found and 'annotations/test/' in found


@pytest.mark.parametrize('split', ['train', 'test'])
def test_depth_that_is_all_zero(split, data, tmp_path):
    change_maps(data / 'nyu' / 'annotations' / split, np.zeros_like)
    cfg = config('nyu', data, tmp_path)
    refused(cfg, 'hold only 0, which means unknown' if split == 'train' else 'no depth in the map lies between')


def test_one_map_without_depth_makes_the_metrics_nan(data, tmp_path):
    """In training it is allowed: the head leaves it out."""
    for split in ('train', 'test'):
        path = sorted((data / 'nyu' / 'annotations' / split).iterdir())[2]
        cv2.imwrite(str(path), np.zeros_like(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
        cfg = config('nyu', data, tmp_path)
        if split == 'train':
            assert find_mistakes(cfg) == []
    assert path.name in refused(cfg, 'no depth in the map lies between')


def test_what_a_metric_measures():
    from mmengine.registry import METRICS

    init_default_scope('mmseg')
    rng = np.random.default_rng(0)
    for crop in (None, 'nyu_crop'):
        metric = METRICS.build(dict(type='DepthMetric', min_depth_eval=0.5, max_depth_eval=8.0, crop_type=crop))
        depth = rng.uniform(0, 10, (480, 640)).astype(np.float32)
        expected = metric._get_eval_mask(torch.from_numpy(depth)).numpy()
        assert np.array_equal(DepthRange.of(metric).mask(depth), expected) and 0 < expected.mean() < 1
    outside = np.zeros((480, 640), np.float32)
    outside[0] = 3
    assert 'within the NYU crop' in DepthRange.of(metric).find_fault(outside)
    assert DepthRange(0.5, 8, False).find_fault(outside) is None


# What is not there.


def test_data_that_is_not_there_is_named(tmp_path):
    cfg = config('coco', tmp_path / 'nowhere', tmp_path)
    assert find_mistakes(cfg) == [] and len(unseen_data(cfg)) == 2 and 'nowhere/coco' in unseen_data(cfg)[0]
    cfg.model.roi_head.bbox_head.num_classes = 3
    assert 'roi_head.bbox_head is for 3 classes' in find_mistakes(cfg)[0]
    assert find_mistakes(cfg, data=False) == []


def test_nothing_is_downloaded(tmp_path, monkeypatch):
    cfg = load_config(str(ROOT / 'configs/cifar100/vit-base-p16-mae_icon_8xb128-100e_cifar100.py'))
    for part in PARTS:
        cfg[f'{part}_dataloader'].dataset.data_root = str(tmp_path)
    monkeypatch.setattr(
        'mmpretrain.datasets.cifar.download_and_extract_archive', lambda *a, **k: pytest.fail('download')
    )
    assert all('cannot be loaded' in sentence for sentence in find_mistakes(cfg))


def test_data_that_cannot_be_loaded_is_said(data, tmp_path):
    cfg = config('coco', data, tmp_path)
    path = data / 'coco' / 'annotations' / 'instances_train2017.json'
    path.write_text(path.read_text()[:-40])
    assert 'cannot be loaded: JSONDecodeError' in find_mistakes(cfg)[0]
    assert json.loads((path.parent / 'instances_val2017.json').read_text())['images']


def test_heads_of_a_model_and_of_its_config_are_the_same():
    cfg = Config.fromfile(ROOT / 'configs' / CONFIGS['coco'])
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    assert isinstance(model, nn.Module) and look_at_model(model) == look_at_model(cfg.model)
