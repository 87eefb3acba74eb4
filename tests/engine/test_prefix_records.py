"""Samples as bytes, and the files they lie in."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData, PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.engine.prefix_cache import shards as files
from iconformer_mm.engine.prefix_cache.draws import pack, stack, unpack
from iconformer_mm.engine.prefix_cache.records import UnstorableError, decode, encode
from iconformer_mm.engine.prefix_cache.shards import MANIFEST, Shards, check_space, filling
from iconformer_mm.tuning.prefix import PrefixError


def back(value):
    return decode(bytearray(encode(value)))


def equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize(
    'value',
    [
        None,
        [1, -2.5, 'a "text" ö', True, float('inf')],
        (1, (2, [3])),
        {'a': 1, 2: {'b': (None,)}},
        np.float32(0.1),
        np.bool_(True),
        np.arange(6, dtype='>i2').reshape(2, 3),
        np.ones((3, 9, 9), np.uint8),
        np.zeros((0, 4), np.float32),
        torch.rand(2, 3),
        torch.rand(4).to(torch.bfloat16),
        torch.tensor(3),
        torch.zeros(1)[:, None].expand(1, 5)[0, :1],
        torch.randint(0, 255, (1, 20, 20)),
        torch.randint(-30000, 30000, (99,)),
        torch.full((70,), 2**40),
        torch.zeros(0, 4, dtype=torch.int64),
        torch.rand(3, 4).t(),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_values_come_back(value):
    assert equal(back(value), value)


def test_maps_of_classes_take_a_byte_a_pixel_and_masks_a_bit():
    labels, masks = torch.randint(0, 150, (1, 64, 64)), np.ones((8, 64, 64), np.uint8)
    assert len(encode(labels)) < 64 * 64 + 200
    assert len(encode(masks)) < 64 * 64 + 200


def test_samples_of_all_libraries_come_back():
    label = DataSample(metainfo=dict(img_path='a.png', scale_factor=(0.5, 0.5))).set_gt_label(3)
    found = back(label)
    assert type(found) is DataSample and equal(found.gt_label, label.gt_label)
    assert found.metainfo == label.metainfo and found.keys() == label.keys()

    seg = SegDataSample(metainfo=dict(img_shape=(4, 4)))
    seg.gt_sem_seg = PixelData(data=torch.randint(0, 9, (1, 4, 4)))
    seg.gt_depth_map = PixelData(data=torch.rand(1, 4, 4))
    found = back(seg)
    assert equal(found.gt_sem_seg.data, seg.gt_sem_seg.data) and equal(found.gt_depth_map.data, seg.gt_depth_map.data)

    det = DetDataSample(metainfo=dict(homography_matrix=np.eye(3, dtype=np.float32)))
    det.gt_instances = InstanceData(
        bboxes=HorizontalBoxes(torch.tensor([[0.0, 1.0, 2.0, 3.0]])),
        labels=torch.tensor([4]),
        masks=BitmapMasks(np.ones((1, 8, 8), np.uint8), 8, 8),
    )
    det.ignored_instances = InstanceData(bboxes=HorizontalBoxes(torch.zeros(0, 4)))
    found = back(det)
    assert type(found.gt_instances) is InstanceData and len(found.gt_instances) == 1
    assert equal(found.gt_instances.bboxes.tensor, det.gt_instances.bboxes.tensor)
    assert np.array_equal(found.gt_instances.masks.masks, det.gt_instances.masks.masks)
    assert len(found.ignored_instances.bboxes) == 0
    assert np.array_equal(found.homography_matrix, np.eye(3))

    polygons = PolygonMasks([[np.array([0.0, 0, 1, 0, 1, 1])]], 4, 4)
    assert np.array_equal(back(polygons).masks[0][0], polygons.masks[0][0])


def test_what_cannot_be_stored():
    with pytest.raises(UnstorableError, match=r'holds a pathlib\.\w+, which the prefix cache cannot store'):
        encode({'a': [__import__('pathlib').PurePosixPath('a')]})
    with pytest.raises(UnstorableError, match='array of objects'):
        encode(np.array([object()]))


def change(data, old, new):
    assert old in data
    return bytearray(bytes(data).replace(old, new))


@pytest.mark.parametrize(
    'damage',
    [
        lambda data: data[:20],
        lambda data: bytearray(),
        lambda data: data[:-8],
        lambda data: change(data, b'"tensor"', b'"tensar"'),
        lambda data: change(data, b'float32', b'float99'),
        lambda data: change(data, b'[64]', b'[99]'),
        lambda data: change(data, b'data_sample.DataSample', b'data_sample.DataSamp1e'),
        lambda data: bytearray(b'\xff' * 8) + data[8:],
    ],
)
def test_damaged_records(damage):
    data = bytearray(encode({'t': torch.rand(64), 's': DataSample()}))
    with pytest.raises(DamagedFileError, match='a record of the prefix cache is damaged'):
        decode(damage(data))


def test_a_sample_has_a_blank_image_and_what_was_recorded():
    item = dict(inputs=torch.full((3, 4, 5), 7, dtype=torch.uint8), data_samples=DataSample().set_gt_label(1))
    calls = [{'layers.1/0/0': torch.rand(1, 5, 8)}]
    sample = unpack(bytearray(pack(item, calls, torch.bfloat16)))
    assert sample['inputs'].shape == (3, 4, 5) and sample['inputs'].dtype == torch.uint8 and not sample['inputs'].any()
    assert sample['data_samples'].gt_label == 1
    (found,) = stack([sample['prefix'], sample['prefix']])
    value = found['layers.1/0/0']
    assert value.shape == (2, 5, 8) and value.dtype == torch.float32
    assert torch.equal(value[0], calls[0]['layers.1/0/0'][0].to(torch.bfloat16).float())

    other = unpack(bytearray(pack(item, [{'layers.1/0/0': torch.rand(1, 6, 8)}], None)))
    with pytest.raises(PrefixError, match='images of one batch differ in size; use batch_size=1'):
        stack([sample['prefix'], other['prefix']])


# Files

RECORDS = [encode({'image': i, 'x': torch.full((100,), float(i))}) for i in range(5)]


@pytest.fixture
def cache(tmp_path):
    shards = Shards(tmp_path / 'cache', 'k' * 64, 5)
    assert not shards.find()
    shards.create(2, {'data': 'test'})
    for shard in range(3):
        shards.write(0, shard, [RECORDS[i] for i in shards.range(shard)])
    return shards


def fresh(cache):
    return Shards(cache.folder, cache.key, cache.images)


def test_records_come_back_in_any_order(cache):
    cache = fresh(cache)
    assert cache.find() and cache.per_shard == 2 and not cache.missing(1) and len(cache.missing(2)) == 3
    cache.check(1)
    for image in (4, 0, 3, 1, 2):
        assert bytes(cache.read(0, image)) == RECORDS[image]


def test_few_files_are_mapped_at_a_time(cache, monkeypatch):
    monkeypatch.setattr(files, '_OPEN', 2)
    cache.check(1)
    assert len(cache._mapped) == 2
    assert [decode(cache.read(0, i))['image'] for i in range(5)] == list(range(5))


def test_a_truncated_shard(cache):
    path = cache.path(0, 1)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(DamagedFileError, match='view00-00001.safetensors is damaged: .* Delete this file'):
        fresh_check(cache)
    path.unlink()  # as it says
    assert fresh_missing(cache) == [(0, 1)]


def fresh_check(cache):
    other = fresh(cache)
    other.find()
    other.check(1)


def fresh_missing(cache):
    other = fresh(cache)
    other.find()
    return other.missing(1)


def test_an_altered_record(cache):
    path = cache.path(0, 0)
    data = bytearray(path.read_bytes())
    place = data.find(RECORDS[1][-64:])
    data[place] ^= 1
    path.write_bytes(data)
    other = fresh(cache)
    other.find()
    assert bytes(other.read(0, 0)) == RECORDS[0]
    with pytest.raises(DamagedFileError, match='the record of image 1 was altered'):
        other.read(0, 1)


def test_a_shard_of_another_cache(cache, tmp_path):
    other = Shards(tmp_path / 'other', 'x' * 64, 5)
    other.create(2, {})
    other.write(0, 0, RECORDS[:2])
    shutil.copy(other.path(0, 0), cache.path(0, 0))
    with pytest.raises(DamagedFileError, match='belongs to another cache'):
        fresh_check(cache)
    cache.path(0, 0).write_text('not a safetensors file')
    with pytest.raises(DamagedFileError, match='is damaged'):
        fresh_check(cache)


def test_a_foreign_folder(cache):
    manifest = cache.folder / MANIFEST
    content = json.loads(manifest.read_text())
    for text, message in (
        (json.dumps({**content, 'key': 'y' * 64}), 'belongs to another cache than its folder'),
        (json.dumps({**content, 'per_shard': 0}), 'is damaged'),
        ('{', 'is damaged'),
        ('[' * 10**5, 'is damaged'),
    ):
        manifest.write_text(text)
        with pytest.raises(DamagedFileError, match=message):
            fresh(cache).find()
    manifest.unlink()
    with pytest.raises(DamagedFileError, match='it is no prefix cache, or a part of one'):
        fresh(cache).find()


def test_a_full_disk_in_the_middle(cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(files, 'save_safetensors', full)
    with pytest.raises(PrefixError, match='is full. The shards of the prefix cache that are complete are kept'):
        cache.write(1, 0, RECORDS[:2])
    assert not fresh_missing(cache)


def test_a_disk_without_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 30)
    monkeypatch.setattr(files.shutil, 'disk_usage', lambda path: usage)
    check_space(tmp_path / 'not' / 'there', 1 << 30, 'it')
    with pytest.raises(PrefixError, match='it would take 5.0 GiB, and the disk of .* has 3.0 GiB free'):
        check_space(tmp_path / 'not' / 'there', 5 << 30, 'it')


@pytest.mark.parametrize('what', ['a file', 'below a file'])
def test_a_folder_that_cannot_be_made(tmp_path, what):
    (tmp_path / 'file').write_text('')
    folder = tmp_path / 'file' if what == 'a file' else tmp_path / 'file' / 'cache'
    with pytest.raises(PrefixError, match='the prefix cache cannot be written'), filling(folder):
        pass


def test_abandoned_files_of_a_killed_process_go(tmp_path):
    abandoned = tmp_path / '.writing-view00-00000.safetensors.abc'
    abandoned.mkdir()
    (abandoned / '.lock').write_text('')
    (abandoned / 'view00-00000.safetensors').write_text('half of it')
    with filling(tmp_path):
        assert not abandoned.exists()


def test_fields_set_in_any_order_make_the_same_bytes():
    """MMEngine keeps names of fields in sets, whose order is that of a process and of how they were filled."""
    names = [f'field_{n}' for n in range(12)]
    records = set()
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(names)
        sample, instances = DataSample(), InstanceData()
        for name in order:
            sample.set_field(len(name), name, field_type='metainfo')
            instances.set_field(torch.ones(3), name, field_type='data')
        records.add(encode(dict(sample=sample, instances=instances)))
    assert len(records) == 1
    assert encode(decode(bytearray(records.copy().pop()))) in records
