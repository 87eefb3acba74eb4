"""The benchmark of swapped kernels finds the groups that an image belongs to."""

import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from mmpretrain.datasets import CustomDataset

from iconformer_mm.analysis.kernel_swap import KernelBank
from iconformer_mm.comparison.image_scores import ImageScores
from iconformer_mm.datasets.conditions import write_conditions
from iconformer_mm.files import write_json

sys.path.insert(0, str(ROOT / 'benchmarks'))
import kernel_swap  # noqa: E402


def test_groups_and_shares(tmp_path):
    """Kernels that are made of the class share out to the class alone."""
    for name in ('cat', 'dog'):
        folder = tmp_path / 'clear' / 'test' / name
        folder.mkdir(parents=True)
        for index in range(12):
            cv2.imwrite(str(folder / f'{index}.png'), np.full((16, 16, 3), 90, np.uint8))
    backgrounds = [['sea.jpg', 'a.png'] if index % 3 else ['sky.jpg', 'a.png'] for index in range(12)]
    write_json(tmp_path / 'clear' / 'sources.json', {'test/cat': backgrounds, 'test/dog': backgrounds[::-1]})
    conditions = write_conditions(tmp_path / 'clear', tmp_path / 'mixed')
    clear, mixed = (
        CustomDataset(data_root=str(tmp_path / name), data_prefix='test', pipeline=[]) for name in ('clear', 'mixed')
    )
    groups = kernel_swap.groups_of(mixed)
    names = [mixed.get_data_info(index)['img_path'].split('mixed/')[1] for index in range(24)]
    assert names[:3] == ['test/cat/0.png', 'test/cat/1.png', 'test/cat/10.png']
    shown = {'test/cat': backgrounds, 'test/dog': backgrounds[::-1]}
    assert groups.pop('backgrounds') == [shown[name[:8]][int(name[9:-4])][0] for name in names]
    assert groups == {'classes': [0] * 12 + [1] * 12, 'conditions': [conditions[name] for name in names]}
    assert kernel_swap.groups_of(clear).keys() == {'classes', 'backgrounds'}
    bank = KernelBank()
    bank._parts['layers.0'] = [torch.tensor(groups['classes'], dtype=torch.float32).view(24, 1, 1, 1)]
    (row,) = kernel_swap.share_rows('pets', bank, groups)
    assert (row['task'], row['layer'], row['images'], row['classes']) == ('pets', 'layers.0', 1, 1)
    assert abs(row['conditions']) < 0.5


@pytest.mark.parametrize('image', ['images/testing/ADE_test_00000001.jpg', 'test2017/000000000001.jpg', 'test/1.jpg'])
def test_what_an_image_shows_in_each_format(image, tmp_path):
    found = dict(train=[['no.jpg'], ['no.jpg']], test=[['sea.jpg'], ['sky.jpg', 'a.png']])
    assert kernel_swap.source_of(found, tmp_path / image, tmp_path) == ['sky.jpg', 'a.png']


def test_what_a_swap_loses():
    """A score that is a mean over images has an interval; an average precision has none."""
    ones = np.ones((200, 1))
    own, swapped = (ImageScores(values, ones) for values in (100 * ones, np.repeat([[100.0], [0.0]], 100, axis=0)))
    found = kernel_swap.difference(kernel_swap.Scored(100.0, own), kernel_swap.Scored(50.0, swapped))
    assert found['lost'] == 50 and 40 < found['low'] < 50 < found['high'] < 60
    assert kernel_swap.difference(kernel_swap.Scored(5.0, None), kernel_swap.Scored(4.0, None)) == dict(lost=1.0)
