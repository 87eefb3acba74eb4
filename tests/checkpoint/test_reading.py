"""Checkpoints of others are read, and nothing in them is executed."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from iconformer_mm.checkpoint import DamagedFileError, reading
from iconformer_mm.checkpoint.reading import UntrustedFileError, read_checkpoint, state_dict_of


@pytest.fixture(params=['weights_only', 'restricted'], autouse=True)
def _reader(request, monkeypatch):
    """That of torch, and the one for releases of torch that cannot be told what is harmless."""
    load = reading._load_weights if request.param == 'weights_only' else reading._load_restricted
    if request.param == 'weights_only' and reading._load_safely is reading._load_restricted:
        pytest.skip('this torch has a fixed list')
    monkeypatch.setattr(reading, '_load_safely', load)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('zipped', [True, False])
def test_a_training_checkpoint_of_mmengine_is_read(zipped, tmp_path):
    history = HistoryBuffer([3.0, 1.0], [1, 1])
    checkpoint = dict(
        meta=dict(epoch=1, score=np.float64(0.5), classes=('a', 'b'), which=np.arange(3)),
        state_dict={'w': torch.ones(2), 'p': torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))},
        message_hub=dict(log_scalars=dict(loss=history), runtime_info={}, resumed_keys={}),
    )
    torch.save(checkpoint, tmp_path / 'a.pth', _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(tmp_path / 'a.pth')
    assert torch.equal(read['state_dict']['w'], torch.ones(2)) and read['meta']['score'] == 0.5
    loss = read['message_hub']['log_scalars']['loss']
    assert type(loss) is HistoryBuffer and loss.mean() == 2 and loss.statistics('min') == 1


@pytest.mark.parametrize('whole', [True, False], ids=['by torch', 'bare'])
def test_code_is_not_executed_unless_the_file_is_trusted(whole, tmp_path):
    path, mark = tmp_path / 'a.pth', tmp_path / 'executed'
    chain = Evil(getattr, HistoryBuffer, '__init__')  # from what is allowed to what is not
    for evil in (Evil(os.system, f'touch {mark}'), Evil(exec, f'open({str(mark)!r}, "w")'), Evil(print, chain)):
        if whole:
            torch.save(dict(state_dict=dict(w=evil)), path)
        else:
            path.write_bytes(pickle.dumps(evil))
        with pytest.raises(UntrustedFileError, match=r'a.pth holds more than tensors.*add --trust\. \('):
            read_checkpoint(path, advice='add --trust')
        assert not mark.exists()
    torch.save(dict(state_dict=dict(w=Evil(os.system, f'touch {mark}'))), path)
    read_checkpoint(path, trust=True)
    assert mark.exists()


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    path = tmp_path / 'a.pth'
    torch.jit.script(torch.nn.ReLU()).save(path)
    with pytest.raises(UntrustedFileError, match='TorchScript'):
        read_checkpoint(path)
    torch.save(dict(w=torch.ones(1000)), path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DamagedFileError, match='a.pth is not a valid checkpoint'):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match='none.pth does not exist'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(DamagedFileError, match='holds no `state_dict` of tensors'):
        state_dict_of(dict(state_dict=dict(w='text')), path)


def test_a_guarded_process_does_not_unpickle_by_mmengine(tmp_path):
    path, mark = tmp_path / 'a.pth', tmp_path / 'executed'
    torch.save(dict(state_dict=dict(w=Evil(os.system, f'touch {mark}'))), path)
    code = (
        'from iconformer_mm.checkpoint.reading import guard_loading; from mmengine.runner import CheckpointLoader; '
        f'guard_loading(advice="add --x"); CheckpointLoader.load_checkpoint({str(path)!r})'
    )
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert result.returncode != 0 and 'could execute code' in result.stderr and not mark.exists()
