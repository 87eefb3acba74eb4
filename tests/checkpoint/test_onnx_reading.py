import pytest
import torch
from torch import nn

from iconformer_mm import extras
from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.checkpoint.onnx_reading import read_onnx
from iconformer_mm.extras import MissingExtraError

onnx = pytest.importorskip('onnx')


def linear_graph(path, external=False):
    """Two layers as PyTorch's exporter writes them: nameless (in, out) matrices, biases by name."""
    torch.manual_seed(0)
    layers = nn.ModuleDict({'a': nn.Linear(3, 4), 'b': nn.Linear(4, 2)})
    nodes, weights, value = [], [], 'x'
    for number, (name, layer) in enumerate(layers.items()):
        matrix = f'onnx::MatMul_{number + 7}'
        weights += [
            onnx.numpy_helper.from_array(layer.weight.detach().t().contiguous().numpy(), matrix),
            onnx.numpy_helper.from_array(layer.bias.detach().numpy(), f'{name}.bias'),
        ]
        nodes += [
            onnx.helper.make_node('MatMul', [value, matrix], [f'product{number}']),
            onnx.helper.make_node('Add', [f'{name}.bias', f'product{number}'], [f'out{number}']),
        ]
        value = f'out{number}'
    weights += [
        onnx.numpy_helper.from_array(torch.randn(1, 1, 3).numpy(), 'cls_token'),
        onnx.numpy_helper.from_array(torch.zeros(1, 1, 3).numpy(), 'onnx::Concat_20'),
        onnx.numpy_helper.from_array(torch.ones(1, 4, 3).numpy(), 'onnx::Reshape_21'),
        onnx.numpy_helper.from_array(torch.ones(2, 2).numpy(), 'onnx::MatMul_99'),
    ]
    kinds = [
        onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None, c]) for n, c in (('x', 3), (value, 2))
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, 'g', kinds[:1], kinds[1:], weights))
    onnx.save(model, path, save_as_external_data=external, size_threshold=0)
    return layers


def test_matrices_get_the_names_of_their_layers(tmp_path):
    layers = linear_graph(tmp_path / 'a.onnx')
    tensors = read_onnx(tmp_path / 'a.onnx')
    for name, value in layers.state_dict().items():
        assert torch.equal(tensors.pop(name), value)
    assert torch.equal(tensors.pop('position_embeddings'), torch.cat([torch.zeros(1, 1, 3), torch.ones(1, 4, 3)], 1))
    # What nothing names keeps the name it has, so that who takes the tensors sees it.
    assert sorted(tensors) == ['cls_token', 'onnx::MatMul_99']


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / 'a.onnx'
    linear_graph(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DamagedFileError, match='not a valid ONNX file'):
        read_onnx(path)
    path.write_bytes(b'')
    with pytest.raises(DamagedFileError, match='holds no weights'):
        read_onnx(path)
    with pytest.raises(FileNotFoundError):
        read_onnx(tmp_path / 'b.onnx')


def test_other_files_are_not_opened(tmp_path):
    linear_graph(tmp_path / 'a.onnx', external=True)
    with pytest.raises(DamagedFileError, match='weights in other files, which are not opened'):
        read_onnx(tmp_path / 'a.onnx')


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, 'find_spec', lambda name: None)
    with pytest.raises(MissingExtraError, match=r'reading an ONNX file needs onnx, .*iconformer_mm\[onnx\]'):
        read_onnx(tmp_path / 'a.onnx')
