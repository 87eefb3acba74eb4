import json

import cv2
import h5py
import numpy as np
import pytest
from commands import tool
from mmengine.registry import init_default_scope
from scipy.io import savemat

from iconformer_mm.datasets.scenes import CAMERA_HEIGHT, CLASSES, SHAPES, WRITERS, render_scene, scenes

SIZE = (96, 128)


@pytest.fixture(scope='module')
def rendered():
    return list(scenes(12, seed=3, size=SIZE))


@pytest.fixture(scope='module')
def folders(tmp_path_factory, rendered):
    root = tmp_path_factory.mktemp('scenes')
    for name, write in WRITERS.items():
        for split in ('train', 'val'):
            write(root / name, split, iter(rendered))
    return root


def test_maps_agree_with_each_other(rendered):
    for scene in rendered:
        assert scene.image.shape == (*SIZE, 3) and scene.image.dtype == np.uint8
        assert scene.depth.min() > 0 and scene.depth.max() < 10
        covered = np.zeros(SIZE, int)
        for mask, label in zip(scene.masks, scene.labels):
            covered += mask
            assert (scene.semantic[mask] == CLASSES.index(SHAPES[label])).all()
            assert np.ptp(scene.depth[mask]) == 0  # flat and upright
            assert mask.sum() >= 12
        assert covered.max() <= 1  # what is hidden belongs to nobody
        shapes = np.isin(scene.semantic, [CLASSES.index(s) for s in SHAPES])
        assert (covered.astype(bool) & ~shapes).sum() == 0
        assert np.ptp(scene.depth[scene.semantic == CLASSES.index('wall')]) == 0


def test_depth_of_the_floor_is_that_of_a_plane(rendered):
    """1 / depth is linear in the row, with the slope of the camera's height and focal length."""
    for scene in rendered:
        rows, _ = np.where(scene.semantic == CLASSES.index('floor'))
        inverse = 1 / scene.depth[scene.semantic == CLASSES.index('floor')]
        slope = np.polyfit(rows, inverse, 1)[0]
        assert slope == pytest.approx(1 / (CAMERA_HEIGHT * 0.9 * SIZE[1]), rel=1e-3)


def test_nearer_objects_hide_farther_ones_and_stand_lower(rendered):
    for scene in rendered:
        feet = {np.where(m)[0].max(): scene.depth[m][0] for m in scene.masks if np.where(m)[0].max() < SIZE[0] - 1}
        whole = sorted(feet)
        for upper, lower in zip(whole, whole[1:]):
            # A visible foot further down is nearer, unless the foot itself is hidden.
            if feet[lower] > feet[upper]:
                assert len(scene.masks) > 1


def test_seeds_and_styles():
    first, again = (next(scenes(1, seed=5)) for _ in range(2))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.image, next(iter(scenes(3, seed=5))).image)
    target = next(scenes(1, seed=5, style='target'))
    assert not np.array_equal(first.image, target.image)
    assert (
        np.abs(np.diff(first.image.astype(int), axis=2)).mean()
        > np.abs(np.diff(target.image.astype(int), axis=2)).mean()
    )  # the target is duller
    with pytest.raises(ValueError, match="style must be one of source, target, mixed, got 'night'"):
        render_scene(np.random.default_rng(0), 'night')


def test_conditions_change_from_scene_to_scene():
    mixed = [scene.image.astype(float) for scene in scenes(24, seed=5, style='mixed')]
    brightness = [image.mean() for image in mixed]
    noise = [np.abs(np.diff(image, axis=1)).mean() for image in mixed]
    assert max(brightness) > 2 * min(brightness) and max(noise) > 4 * min(noise)
    target = [np.abs(np.diff(scene.image.astype(float), axis=1)).mean() for scene in scenes(24, seed=5, style='target')]
    assert max(target) < 4 * min(target)


def test_coco_format(folders, rendered):
    """Read by pycocotools, the masks are the scenes'."""
    from pycocotools.coco import COCO

    coco = COCO(str(folders / 'coco' / 'annotations' / 'instances_val2017.json'))
    assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(SHAPES)
    for number, scene in enumerate(rendered):
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=[number]))
        assert [a['category_id'] - 1 for a in annotations] == scene.labels
        for annotation, mask in zip(annotations, scene.masks):
            np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            x, y, w, h = (int(n) for n in annotation['bbox'])
            inside = np.zeros_like(mask)
            inside[y : y + h, x : x + w] = True
            assert not (mask & ~inside).any() and annotation['area'] == mask.sum()
        grey = cv2.imread(str(folders / 'coco' / 'val2017' / f'{number:012d}.jpg'), cv2.IMREAD_GRAYSCALE)
        assert np.abs(grey.astype(int) - cv2.cvtColor(scene.image, cv2.COLOR_RGB2GRAY)).mean() < 5  # JPEG


def test_mmdet_reads_coco(folders):
    from mmdet.registry import DATASETS

    init_default_scope('mmdet')
    dataset = DATASETS.build(
        dict(
            type='CocoDataset',
            data_root=str(folders / 'coco'),
            ann_file='annotations/instances_train2017.json',
            data_prefix=dict(img='train2017/'),
            metainfo=dict(classes=SHAPES),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                dict(type='PackDetInputs'),
            ],
        )
    )
    sample = dataset[0]['data_samples'].gt_instances
    assert len(sample.labels) == len(sample.masks) == len(sample.bboxes) > 0


def test_mmseg_reads_ade20k_and_nyu(folders, rendered):
    from mmseg.registry import DATASETS

    init_default_scope('mmseg')
    dataset = DATASETS.build(
        dict(
            type='ADE20KDataset',
            data_root=str(folders / 'ade20k'),
            data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', reduce_zero_label=True),
                dict(type='PackSegInputs'),
            ],
        )
    )
    for index, scene in enumerate(rendered):
        np.testing.assert_array_equal(dataset[index]['data_samples'].gt_sem_seg.data[0].numpy(), scene.semantic)
    dataset = DATASETS.build(
        dict(
            type='NYUDataset',
            data_root=str(folders / 'nyu'),
            data_prefix=dict(img_path='images/test', depth_map_path='annotations/test'),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadDepthAnnotation', depth_rescale_factor=1e-3),
                dict(type='PackSegInputs', meta_keys=('img_path', 'category_id')),
            ],
        )
    )
    for index, scene in enumerate(rendered):
        sample = dataset[index]['data_samples']
        np.testing.assert_allclose(sample.gt_depth_map.data[0].numpy(), scene.depth, atol=5.1e-4)
        assert dataset.metainfo['classes'][sample.category_id] == 'study'


def test_mmpretrain_reads_folders(folders, rendered):
    from mmpretrain.registry import DATASETS

    dataset = DATASETS.build(dict(type='CustomDataset', data_root=str(folders / 'classification'), data_prefix='train'))
    assert sorted(dataset.CLASSES) == sorted({SHAPES[k] for s in rendered for k in s.labels})
    assert len(dataset) == sum(len(s.masks) for s in rendered)


def converter(name, *arguments, ok=True):
    return tool(f'dataset_converters/{name}', *arguments, ok=ok)


def test_make_scenes(tmp_path):
    out = tmp_path / 'scenes'
    converter('make_scenes.py', '--out', out, '--train', 3, '--val', 2, '--formats', 'coco', 'nyu')
    for style in ('source', 'target'):
        assert sorted(p.name for p in (out / style).iterdir()) == ['coco', 'nyu']
        content = json.loads((out / style / 'coco' / 'annotations' / 'instances_train2017.json').read_text())
        assert len(content['images']) == 3
        assert len(list((out / style / 'nyu' / 'images' / 'test').iterdir())) == 2
    images = [p.read_bytes() for p in out.glob('*/coco/*/*.jpg')]
    assert len(set(images)) == len(images) == 10  # no scene twice, in no split and no style
    assert 'at least one scene a split' in converter('make_scenes.py', '--out', out, '--train', 0, ok=False)


def nyu_files(folder, depths=None, names=('kitchen', 'living_room', 'office')):
    """The official files' layout: MATLAB 7.3, arrays with the columns first, names by reference."""
    rng = np.random.default_rng(0)
    ramps = np.stack(
        [np.arange(64)[:, None] * 3 + np.arange(48) * k for k in (0, 1, -1)]
    )  # tell x, y and colours apart
    images = np.stack([ramps + shift for shift in (48, 52, 56)]).clip(0, 255).astype(np.uint8)
    depths = rng.uniform(0.7, 9.9, size=(3, 64, 48)).astype(np.float32) if depths is None else depths
    with h5py.File(folder / 'labelled.mat', 'w') as file:
        file['images'], file['depths'] = images, depths
        references = file.create_dataset('sceneTypes', (1, 3), dtype=h5py.ref_dtype)
        for index, name in enumerate(names):
            file[f'#refs#/{index}'] = np.array([[ord(c)] for c in name], np.uint16)
            references[0, index] = file[f'#refs#/{index}'].ref
    savemat(folder / 'splits.mat', dict(trainNdxs=np.array([[1], [3]]), testNdxs=np.array([[2]])))
    return images, depths


def test_nyu_converter(tmp_path):
    images, depths = nyu_files(tmp_path)
    out = tmp_path / 'nyu'
    converter('nyu.py', tmp_path / 'labelled.mat', tmp_path / 'splits.mat', '--out', out)
    names = sorted(str(p.relative_to(out)) for p in out.glob('images/*/*'))
    assert names == [
        'images/test/living_room_0002.jpg',
        'images/train/kitchen_0001.jpg',
        'images/train/office_0003.jpg',
    ]
    depth = cv2.imread(str(out / 'annotations/test/living_room_0002.png'), cv2.IMREAD_UNCHANGED)
    assert depth.dtype == np.uint16 and depth.shape == (48, 64)
    np.testing.assert_allclose(depth / 1000, depths[1].T, atol=5.1e-4)
    image = cv2.imread(str(out / 'images/test/living_room_0002.jpg'))[..., ::-1]
    assert np.abs(image.astype(int) - images[1].transpose(2, 1, 0)).mean() < 4  # JPEG
    assert 'exists already' in converter(
        'nyu.py', tmp_path / 'labelled.mat', tmp_path / 'splits.mat', '--out', out, ok=False
    )


def test_nyu_converter_refuses(tmp_path):
    def refuse(message):
        out = tmp_path / 'nyu'
        assert message in converter(
            'nyu.py', tmp_path / 'labelled.mat', tmp_path / 'splits.mat', '--out', out, ok=False
        )
        assert not out.exists()

    refuse('labelled.mat does not exist')
    (tmp_path / 'labelled.mat').write_bytes(b'not a mat file')
    refuse('is not a valid MATLAB 7.3 file')
    nyu_files(tmp_path, depths=np.full((3, 64, 48), 3000, np.float32))
    refuse('are not metres of a room')
    nyu_files(tmp_path, depths=np.ones((3, 48, 64), np.float32))
    refuse('do not match')
    nyu_files(tmp_path)
    savemat(tmp_path / 'splits.mat', dict(trainNdxs=np.array([[1]]), testNdxs=np.array([[9]])))
    refuse('names image 9, there are 3')


def test_an_image_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / 'val2017' / '000000000000.jpg').mkdir(parents=True)
    with pytest.raises(OSError, match='000000000000.jpg could not be written'):
        WRITERS['coco'](tmp_path, 'val', scenes(1, 0, size=(48, 64)))
