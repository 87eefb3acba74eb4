"""Safetensors files: their place, their checksum, their JSON."""

import pytest
import torch
from safetensors.torch import save_file

from iconformer_mm.checkpoint import DamagedFileError, read_safetensors, save_safetensors
from iconformer_mm.checkpoint.safetensors_io import parse_json


def test_home_is_home_in_writing_as_in_reading(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save_safetensors({'w': torch.ones(2)}, '~/new/a.safetensors')
    assert (tmp_path / 'new' / 'a.safetensors').is_file()
    assert torch.equal(read_safetensors('~/new/a.safetensors')[1]['w'], torch.ones(2))


def test_a_checksum_of_others_is_theirs(tmp_path):
    save_file({'w': torch.ones(2)}, tmp_path / 'a.safetensors', metadata={'checksum': 'crc32:1234', 'format': 'pt'})
    metadata, tensors = read_safetensors(tmp_path / 'a.safetensors')
    assert metadata['checksum'] == 'crc32:1234' and torch.equal(tensors['w'], torch.ones(2))


def test_the_checksum_of_plain_weights_of_ours_is_looked_at(tmp_path):
    path = tmp_path / 'a.safetensors'
    save_safetensors({'w': torch.ones(2)}, path)
    path.write_bytes(path.read_bytes()[:-1] + b'\0')
    with pytest.raises(DamagedFileError, match='does not match its checksum'):
        read_safetensors(path)


def test_a_key_twice_is_an_error():
    assert parse_json('{"a": {"b": 1}}') == dict(a=dict(b=1))
    with pytest.raises(ValueError, match="has the key 'b' twice"):
        parse_json('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(ValueError, match='nested too deeply'):
        parse_json('[' * 100_000)
