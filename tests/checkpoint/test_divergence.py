import json

import pytest
import torch
from small_classifiers import trained

from iconformer_mm import save_adapter
from iconformer_mm.checkpoint import adapter_file
from iconformer_mm.checkpoint.divergence import find_diverged
from iconformer_mm.cli.adapter import main


def test_nan_and_infinity_are_told_from_a_mask():
    inf, nan = torch.inf, torch.nan
    tensors = dict(
        good=torch.ones(2),
        whole=torch.ones(2, dtype=torch.int64),
        mask=torch.tensor([0.0, -inf]),
        nan=torch.tensor([0.0, nan]),
        infinite=torch.tensor([0.0, inf]),
        below=torch.tensor([1.0, -inf]),
        scalar=torch.tensor(-inf),
        half=torch.tensor([nan], dtype=torch.bfloat16),
        empty=torch.ones(0),
    )
    assert find_diverged(tensors) == ['nan', 'infinite', 'below', 'scalar', 'half']


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_a_diverged_model_leaves_the_file_that_is_there(value, tmp_path):
    path = tmp_path / 'a.safetensors'
    model = trained()
    save_adapter(model, path)
    before = path.read_bytes()
    with torch.no_grad():
        model.backbone.layers[0].adapter_attention.up.weight[0, 0] = value
    with pytest.raises(ValueError, match='its training diverged, 1 tensors hold NaN or infinite values, such as backb'):
        save_adapter(model, path)
    assert path.read_bytes() == before


def test_verify_fails_on_a_file_of_a_diverged_run(tmp_path, monkeypatch, capsys):
    path = tmp_path / 'a.safetensors'
    model = trained()
    with torch.no_grad():
        model.head.fc.bias[0] = torch.nan
    with monkeypatch.context() as patch:  # as releases before wrote it
        patch.setattr(adapter_file, 'find_diverged', lambda tensors: [])
        save_adapter(model, path)
    assert main(['info', str(path), '--json']) == 0
    capsys.readouterr()
    assert main(['verify', str(path), '--json']) != 0
    assert 'of a training that diverged' in json.loads(capsys.readouterr().out.splitlines()[-1])['error']
