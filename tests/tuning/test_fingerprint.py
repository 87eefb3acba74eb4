"""Fingerprints of base weights."""

import hashlib

import pytest
import torch

from iconformer_mm.tuning import fingerprint


@pytest.mark.parametrize('size', [1, 7, 2**20])
def test_large_parameters_are_hashed_in_parts(size, monkeypatch):
    """The bytes are those of whole parameters: names with shapes, and values in two half precisions."""
    parameters = {
        'a.weight': torch.randn(5, 9, generator=torch.Generator().manual_seed(0)),
        'b.transposed': torch.arange(12.0).view(3, 4).t(),
        'c.scale': torch.tensor(0.3, dtype=torch.float64),
        'd.half': torch.tensor([0.1, 7e4]).bfloat16(),
    }
    expected = ''
    for dtype in (torch.bfloat16, torch.float16):
        whole = b''.join(
            f'{name} {tuple(value.shape)}\n'.encode() + value.to(dtype).contiguous().view(torch.int16).numpy().tobytes()
            for name, value in parameters.items()
        )
        expected += hashlib.sha256(whole).hexdigest()[:32]
    monkeypatch.setattr(fingerprint, '_VALUES', size)
    assert fingerprint.hash_parameters(parameters) == expected
