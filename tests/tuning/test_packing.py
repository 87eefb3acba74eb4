"""Packed matrices: torchao's values, their errors, their size, and what their heads say."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from iconformer_mm.tuning import packing
from iconformer_mm.tuning.packing import KINDS, Format, is_packed, kind_of, recorded_fingerprints, write_head

pytest.importorskip('torchao', reason='the original stack has none; test_frozen_precision has its message')

each_kind = pytest.mark.parametrize('kind', KINDS)
SHAPES = [(96, 32), (48, 16), (192, 64), (64, 48, 1, 1)]
LEVELS = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
LEVELS += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]


def matrix(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def by_torchao(weight, kind, form):
    """What torchao's own tensor stands for."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_, to_nf4

    if kind == 'nf4':
        return to_nf4(weight.flatten(1), form.block, form.scaler_block).get_original_weight().view(weight.shape)
    layer = nn.Linear(weight[0].numel(), len(weight), bias=False)
    layer.weight.data = weight.flatten(1).clone()
    quantize_(layer, Int8WeightOnlyConfig() if kind == 'int8' else Float8WeightOnlyConfig())
    return layer.weight.dequantize().view(weight.shape)


@each_kind
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_values_are_torchaos(kind, shape):
    form, weight = Format(kind, torch.Size(shape)), matrix(shape)
    packed = form.pack(weight)
    assert packed.dtype == torch.uint8 and packed.numel() == form.nbytes
    expected = by_torchao(weight, kind, form)
    assert torch.equal(form.unpack(packed, torch.float32), expected)
    assert torch.equal(form.unpack(packed, torch.bfloat16), expected.bfloat16())


@each_kind
def test_errors_are_within_the_bounds_of_the_format(kind):
    form, weight = Format(kind, torch.Size((192, 64))), matrix((192, 64))
    rounded = form.unpack(form.pack(weight), torch.float32)
    for row, got in zip(weight.tolist(), rounded.tolist()):
        largest = max(map(abs, row))  # of the row, and, at 64 values a row, of NF4's block
        for exact, value in zip(row, got):
            error = abs(exact - value)
            if kind == 'int8':  # half a step of 255 from -largest to largest; one at the upper end
                assert error <= largest / 127.5 * (0.51 if exact < 0.99 * largest else 1.01)
            elif kind == 'float8':  # three bits after the first, and at least the smallest step
                assert error <= max(abs(exact) / 16, largest / 448 * 2**-10) * 1.001
            else:  # the nearest level; the block's scale itself is rounded to about one in 100
                nearest = min(abs(exact - level * largest) for level in LEVELS)
                assert error <= nearest + 0.02 * largest


@each_kind
@pytest.mark.parametrize(
    'weight',
    [torch.zeros(64, 64), torch.eye(64), torch.full((64, 64), 0.5), -torch.ones(64, 64)],
    ids=['zeros', 'eye', 'halves', 'minus'],
)
def test_extreme_matrices_stay_finite_and_close(kind, weight):
    form = Format(kind, weight.shape)
    rounded = form.unpack(form.pack(weight), torch.float32)
    assert torch.isfinite(rounded).all()
    assert (rounded - weight).abs().max() <= 0.02 * weight.abs().max()
    assert (rounded[weight == 0] == 0).all()


@pytest.mark.parametrize(('kind', 'most'), [('int8', 0.2514), ('float8', 0.2514), ('nf4', 0.1295)])
def test_size(kind, most):
    """Of ViT-B's matrices, to float32: 8 or 4 bits and little else."""
    for shape in ((2304, 768), (768, 768), (3072, 768), (768, 3072)):
        form = Format(kind, torch.Size(shape))
        assert form.nbytes / (4 * form.shape.numel()) < most
        assert form.pack(torch.empty(shape, device='meta')).numel() == form.nbytes


@each_kind
def test_small_matrices_are_left_alone(kind):
    assert Format(kind, torch.Size((64, 64))).fits()
    assert not Format(kind, torch.Size((4, 4))).fits()
    assert not Format('nf4', torch.Size((33, 65))).fits()


@each_kind
def test_heads_say_what_they_are(kind):
    form = Format(kind, torch.Size((32, 64)))
    packed = form.pack(matrix((32, 64)))
    assert is_packed(packed) and kind_of(packed) == kind and recorded_fingerprints(packed) == {}
    before = form.unpack(packed, torch.float32)
    prints = {b'12345678': 'ab' * 32, b'87654321': 'cd' * 32}
    write_head(packed, kind, prints)
    assert recorded_fingerprints(packed) == prints
    assert torch.equal(form.unpack(packed, torch.float32), before)
    assert not is_packed(packed[:-1]) and not is_packed(torch.zeros(500, dtype=torch.uint8))


def weights():
    """Weights of several shapes, dtypes and layouts in memory, with a row of zeros each."""
    made = {
        'a block a row': matrix((48, 64)),
        'blocks over rows': matrix((64, 27)),  # a block every 64 / gcd(27, 64) rows
        'rows of odd parts': matrix((160, 36)),
        'narrow blocks': matrix((6, 8)),
        'wide rows': matrix((3, 4096)),
        'patches': matrix((64, 3, 4, 4)),
        'bfloat16': matrix((96, 40)).bfloat16(),
        'float16': matrix((96, 40)).half(),
        'float64': matrix((96, 40)).double(),
        'transposed': matrix((40, 96)).t(),
        'every other row': matrix((128, 40))[::2],
        'every other column': matrix((64, 80))[:, ::2],
        'channels last': matrix((64, 8, 3, 3)).contiguous(memory_format=torch.channels_last),
        'in a larger one': matrix((64, 100)).bfloat16()[:, 30:70],
    }
    for weight in made.values():
        weight[1] = 0
    return made


def set_sizes(monkeypatch, size):
    monkeypatch.setattr(packing, '_VALUES_OF_NF4', size)
    monkeypatch.setattr(packing, '_VALUES_OF_ROWS', size)


@pytest.mark.parametrize('name', weights())
def test_nf4_in_parts_is_torchaos_conversion_of_the_whole(name, monkeypatch):
    """To the last bit: codes, scales, factors and mean."""
    from torchao.quantization import to_nf4

    weight = weights()[name]
    form = Format('nf4', weight.shape)
    whole = to_nf4(weight.float().flatten(1).contiguous(), form.block, form.scaler_block)
    sound = (weight.float().reshape(-1, form.block) != 0).any(dim=1)  # torchao divides by zero in the others
    for size in (1, 100, 1000, 2**20):
        set_sizes(monkeypatch, size)
        parts = form.parts(form.pack(weight))
        assert torch.equal(parts['scales'], whole.quantized_scalers)
        assert torch.equal(parts['factors'], whole.quantization_factor)
        assert torch.equal(parts['mean'], whole.scaler_mean.reshape(1))
        codes, expected = (v.view(len(sound), -1) for v in (parts['values'], whole.quantized_data))
        assert torch.equal(codes[sound], expected[sound])
        assert (codes[~sound] == 0x77).all()  # twice the level 0


@each_kind
@pytest.mark.parametrize('name', weights())
def test_a_weight_is_packed_in_parts_of_any_size(kind, name, monkeypatch):
    weight = weights()[name]
    form = Format(kind, weight.shape)
    whole = form.pack(weight.clone(memory_format=torch.contiguous_format))
    for size in (1, 100, 1000):
        set_sizes(monkeypatch, size)
        assert torch.equal(form.pack(weight), whole)


class Largest(TorchDispatchMode):
    """Notes the most bytes that the memory of a tensor has which an operator returns, without that of one tensor."""

    def __init__(self, weight):
        self.own = weight.untyped_storage().data_ptr()
        self.nbytes = 0
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if type(tensor) is torch.Tensor and tensor.untyped_storage().data_ptr() != self.own:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return out


@each_kind
def test_temporary_tensors_do_not_grow_with_the_weight(kind):
    weight = torch.zeros(2048, 4096, dtype=torch.bfloat16)
    form = Format(kind, weight.shape)
    with Largest(weight) as largest:
        form.pack(weight)
    assert largest.nbytes == form.nbytes  # the packed weight's; all others are smaller
