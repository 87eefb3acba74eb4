"""Bad data: a message that names the file, or the library's own skip."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch
from commands import tool
from conftest import ROOT
from mmengine.registry import init_default_scope

from iconformer_mm.datasets.checks import CheckedPipeline, DataError
from iconformer_mm.datasets.scenes import WRITERS, scenes
from iconformer_mm.engine import CheckedRunner, load_config

CONFIGS = {
    'coco': 'mask-rcnn_swin-scenes_fpn_full_target.py',
    'ade20k': 'upernet_swin-scenes_full_target.py',
    'nyu': 'depth_swin-scenes_full_target.py',
}
TRAIN_JSON = 'annotations/instances_train2017.json'


@pytest.fixture(scope='module')
def sound(tmp_path_factory):
    root = tmp_path_factory.mktemp('sound')
    for name in CONFIGS:
        for split in ('train', 'val'):
            WRITERS[name](root / name, split, scenes(3, 0))
    return root


@pytest.fixture
def data(sound, tmp_path):
    """A copy of the data that a test may spoil."""
    shutil.copytree(sound, tmp_path / 'data')
    return tmp_path / 'data'


def loader(kind, data, part='train_dataloader', **options):
    cfg = load_config(str(ROOT / 'configs' / 'scenes' / CONFIGS[kind]))
    init_default_scope(cfg.default_scope)
    cfg[part].dataset.data_root = str(data / kind)
    cfg[part].update(options)
    cfg[part].batch_size = 1
    return CheckedRunner.build_dataloader(cfg[part], seed=0)


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first(folder, pattern):
    return sorted(folder.glob(pattern))[0]


@pytest.mark.parametrize('kind', CONFIGS)
@pytest.mark.parametrize('part', ['train_dataloader', 'val_dataloader'])
def test_sound_data_passes_unchanged(kind, part, sound):
    checked = loader(kind, sound, part).dataset
    cfg = load_config(str(ROOT / 'configs' / 'scenes' / CONFIGS[kind]))
    cfg[part].dataset.data_root = str(sound / kind)
    from mmengine.registry import DATASETS

    plain = DATASETS.build(cfg[part].dataset)
    assert isinstance(checked.pipeline, CheckedPipeline) and len(checked) == len(plain) == 3
    for index in range(3):
        np.random.seed(0)
        torch.manual_seed(0)
        ours = checked[index]
        np.random.seed(0)
        torch.manual_seed(0)
        assert torch.equal(ours['inputs'], plain[index]['inputs'])
        assert ours['data_samples'].metainfo['img_path'] == plain[index]['data_samples'].metainfo['img_path']


@pytest.mark.parametrize('kind', CONFIGS)
def test_missing_root_is_named(kind, tmp_path):
    with pytest.raises(DataError, match='cannot be loaded.*FileNotFoundError') as error:
        loader(kind, tmp_path / 'nowhere')
    assert str(tmp_path / 'nowhere') in str(error.value)


def test_truncated_json_is_named(data):
    path = data / 'coco' / TRAIN_JSON
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DataError, match='instances_train2017.json.*JSONDecodeError'):
        loader('coco', data)


def test_json_without_categories_is_named(data):
    edit_json(data / 'coco' / TRAIN_JSON, lambda content: content.pop('categories'))
    with pytest.raises(DataError, match="instances_train2017.json.*KeyError: 'categories'"):
        loader('coco', data)


@pytest.mark.parametrize('emptied', ['images', 'annotations'])
def test_empty_annotation_list_is_refused(data, emptied):
    def change(content):
        content['annotations'] = []
        content[emptied] = []

    edit_json(data / 'coco' / TRAIN_JSON, change)
    with pytest.raises(DataError, match='instances_train2017.json.*has no samples'):
        loader('coco', data)


def test_empty_folder_is_refused(data):
    for path in (data / 'ade20k' / 'images' / 'training').iterdir():
        path.unlink()
    with pytest.raises(DataError, match='ade20k.*has no samples'):
        loader('ade20k', data)


def test_empty_data_set_in_a_wrapper_is_refused(data):
    edit_json(data / 'coco' / TRAIN_JSON, lambda content: content['annotations'].clear())
    cfg = load_config(str(ROOT / 'configs' / 'scenes' / CONFIGS['coco']))
    init_default_scope('mmdet')
    cfg.train_dataloader.dataset.data_root = str(data / 'coco')
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=cfg.train_dataloader.dataset)
    with pytest.raises(DataError, match='RepeatDataset of CocoDataset.*instances_train2017.json.*has no samples'):
        CheckedRunner.build_dataloader(cfg.train_dataloader, seed=0)


def test_image_without_instance_is_skipped_in_training_and_kept_in_testing(data):
    def change(content):
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] != 1]

    for split in ('train', 'val'):
        edit_json(data / 'coco' / f'annotations/instances_{split}2017.json', change)
    assert len(loader('coco', data).dataset) == 2
    kept = loader('coco', data, 'val_dataloader').dataset
    assert len(kept) == 3 and len(kept[1]['data_samples'].gt_instances) == 0


def test_category_out_of_range_is_skipped(data):
    """MMDetection leaves out annotations of categories that the config does not ask for."""
    before = len(loader('coco', data).dataset[0]['data_samples'].gt_instances)

    def change(content):
        content['annotations'][0]['category_id'] = 999

    edit_json(data / 'coco' / TRAIN_JSON, change)
    assert len(loader('coco', data).dataset[0]['data_samples'].gt_instances) == before - 1


@pytest.mark.parametrize('workers', [0, 1])
def test_label_out_of_range_is_named(data, workers):
    for path in (data / 'ade20k' / 'annotations' / 'training').glob('*.png'):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        labels[0, 0] = 12
        cv2.imwrite(str(path), labels)
    batches = iter(loader('ade20k', data, num_workers=workers))
    with pytest.raises(DataError, match=r'annotations/training/ADE_train_0000000\d.png: the label map holds 11'):
        next(batches)


def test_ignored_labels_pass(data):
    path = first(data / 'ade20k' / 'annotations' / 'training', '*.png')
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    labels[:4] = 0
    cv2.imwrite(str(path), labels)
    sample = loader('ade20k', data).dataset[0]['data_samples']
    assert (sample.gt_sem_seg.data == 255).any()


def test_label_map_of_another_size_or_in_colour_is_named(data):
    path = first(data / 'ade20k' / 'annotations' / 'training', '*.png')
    labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), labels[:48])
    dataset = loader('ade20k', data).dataset
    with pytest.raises(DataError, match=f'{path.name}: the label map is 48 x 128, but the image is 96 x 128'):
        dataset[0]
    cv2.imwrite(str(path), np.stack([labels] * 3, axis=-1))
    with pytest.raises(DataError, match=f'{path.name}.*one channel'):
        dataset[0]


def test_depth_of_another_size_is_named(data):
    path = first(data / 'nyu' / 'annotations' / 'train', '*.png')
    depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), depth[:, :64])
    with pytest.raises(DataError, match=f'{path.name}: the depth map is 96 x 64, but the image is 96 x 128'):
        loader('nyu', data).dataset[0]


def test_depth_in_another_unit_is_named(data):
    path = first(data / 'nyu' / 'annotations' / 'train', '*.png')
    depth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    cv2.imwrite(str(path), (depth // 1000).astype(np.uint8))  # metres, 8 bits
    with pytest.raises(DataError, match=f'{path.name}: the largest depth is 0.00.*depth_rescale_factor'):
        loader('nyu', data).dataset[0]
    cv2.imwrite(str(path), np.zeros_like(depth))  # nothing is known: allowed
    loader('nyu', data).dataset[0]


@pytest.mark.parametrize(
    ('kind', 'file'),
    [
        ('coco', 'train2017/*.jpg'),
        ('ade20k', 'images/training/*.jpg'),
        ('ade20k', 'annotations/training/*.png'),
        ('nyu', 'annotations/train/*.png'),
    ],
)
@pytest.mark.parametrize('fault', ['missing', 'not an image'])
def test_unreadable_files_are_named(kind, file, fault, data):
    path = first(data / kind, file)
    dataset = loader(kind, data).dataset
    if fault == 'missing':
        path.unlink()
    else:
        path.write_bytes(b'no image')
    with pytest.raises(DataError, match=path.name):
        dataset[0]


@pytest.mark.parametrize('name', ['train.py', 'test.py'])
def test_the_tools_end_with_the_message_alone(name, tmp_path):
    (tmp_path / 'checkpoint.pth').write_bytes(b'')
    config = ROOT / 'configs' / 'scenes' / CONFIGS['ade20k']
    arguments = [tmp_path / 'checkpoint.pth'] if name == 'test.py' else []
    arguments += ['--work-dir', tmp_path, '--cfg-options', 'model.backbone.init_cfg=None']
    arguments += [f'{part}_dataloader.dataset.data_root={tmp_path}/nowhere' for part in ('train', 'test')]
    printed = tool(name, config, *arguments, cwd=tmp_path, ok=False)
    last = printed.strip().splitlines()[-1]
    assert last.startswith('error in the data: BaseSegDataset(') and f'{tmp_path}/nowhere' in last
    assert 'Traceback' not in printed
