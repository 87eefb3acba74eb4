"""What a training checkpoint refuses to hold or to read."""

import json

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
    with pytest.raises(TypeError, match='param_schedulers/1: a object cannot be kept'):
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
