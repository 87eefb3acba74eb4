"""Training from a cache of the frozen prefix."""

import math

import pytest
import torch
from prefix_runs import TASKS, make_config, train, write_data


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('scenes'))


def same(a, b):
    return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b)) and len(a) == len(b)


@pytest.mark.parametrize('host', ['vit', 'swin'])
@pytest.mark.parametrize('task', TASKS)
@pytest.mark.filterwarnings('ignore')
def test_training_is_bit_identical_without_augmentation(task, host, data, tmp_path):
    expected, scalars = train(make_config(task, host, data, tmp_path / 'plain'))
    cache = dict(dir=str(tmp_path / 'cache'))
    found, cached_scalars = train(make_config(task, host, data, tmp_path / 'cached', prefix_cache=cache))
    assert sorted(p.name.split('-')[0] for p in (tmp_path / 'cache').iterdir()) == ['training', 'validation']
    assert found.keys() == expected.keys()
    assert [n for n, v in expected.items() if not torch.equal(v, found[n])] == []
    assert any('val/' in n for n in scalars) and scalars.keys() == cached_scalars.keys()
    assert [n for n in scalars if not same(scalars[n], cached_scalars[n])] == []
