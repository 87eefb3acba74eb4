"""What a training checkpoint refuses to hold or to read."""

import json
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from iconformer_mm.checkpoint import DamagedFileError, load_safetensors, save_safetensors
from iconformer_mm.checkpoint.training_checkpoint import save_checkpoint


def checkpoint(**more):
    return dict(meta=dict(epoch=1), message_hub=dict(runtime_info={}), state_dict=dict(w=torch.ones(2)), **more)


def test_what_cannot_be_kept_is_named_by_its_place(tmp_path):
    path = tmp_path / 'a.safetensors'
    with pytest.raises(TypeError, match='param_schedulers/1: a object cannot be stored'):
        save_checkpoint(checkpoint(param_schedulers=[dict(last_step=1), object()]), str(path))
    assert not list(tmp_path.iterdir())


def test_a_later_version_is_refused(tmp_path):
    path = tmp_path / 'a.safetensors'
    save_checkpoint(checkpoint(), str(path))
    assert load_safetensors(str(path))['meta'] == dict(epoch=1)
    with safe_open(path, 'pt') as file:
        metadata = file.metadata()
    (key,) = [key for key, value in metadata.items() if value.startswith('{')]
    later = {**metadata, key: json.dumps({**json.loads(metadata[key]), 'version': 99})}
    save_safetensors(load_file(path), path, later)
    with pytest.raises(DamagedFileError, match='has checkpoint version 99, this iconformer_mm .* reads version'):
        load_safetensors(str(path))


def same(first, second):
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


@pytest.mark.parametrize(
    'tree',
    [
        lambda t: {'a/b': t(1), 'a': {'b': t(2)}},
        lambda t: {0: t(1), '0': t(2)},
        lambda t: {'a': {0: t(1), '0': t(2), (0, 1): t(3)}, 'a/0': t(4)},
        lambda t: {'a': [t(1), t(2)], 'a/1': t(3), 'a/1#2': t(4)},
        lambda t: {'': t(1), '/': t(2), '__metadata__': t(3)},
        lambda t: {None: t(1), 'None': t(2), True: t(3), 'True': t(4), 1.5: t(5), '1.5': t(6)},
        lambda t: {'$': t(1), 'x': {'$': 'tensor', 'place': 'x'}},
    ],
)
def test_keys_that_read_alike_stay_apart(tree, tmp_path):
    path = str(tmp_path / 'a.safetensors')
    content = tree(lambda number: torch.full((2,), float(number)))
    save_checkpoint(checkpoint(tree=content), path)
    assert same(load_safetensors(path)['tree'], content)


def test_what_would_come_back_as_another_type_is_refused(tmp_path):
    point = namedtuple('Point', 'x y')
    with pytest.raises(TypeError, match='a Point cannot be stored'):
        save_checkpoint(checkpoint(optimizer=point(1, 2)), str(tmp_path / 'a.safetensors'))
    save_checkpoint(checkpoint(size=torch.ones(2, 3).shape), str(tmp_path / 'a.safetensors'))
    assert load_safetensors(str(tmp_path / 'a.safetensors'))['size'] == (2, 3)


def test_code_that_mmengine_would_run_in_resuming_is_dropped(tmp_path):
    path = str(tmp_path / 'a.safetensors')
    content = checkpoint()
    content['meta']['config'] = 'raise SystemExit'
    save_checkpoint(content, path)
    assert load_safetensors(path)['meta'] == dict(epoch=1)


@pytest.mark.parametrize('told', [0.5, 'classes', dict(classes=0.5), dict(classes='cat'), dict(classes=[{}])])
def test_classes_that_are_none_are_refused(told, tmp_path):
    path = str(tmp_path / 'a.safetensors')
    content = checkpoint()
    content['meta']['dataset_meta'] = told
    save_checkpoint(content, path)
    with pytest.raises(DamagedFileError, match=r'a\.safetensors .* its `dataset_meta` has no valid `classes`'):
        load_safetensors(path)
