"""Weights that are read tensor by tensor into modules without values."""

import json

import pytest
import torch
from families import FAMILIES, flatten, image
from safetensors.torch import load_file, save_file
from torch import nn

from iconformer_mm import inject
from iconformer_mm.checkpoint import DamagedFileError, base_difference, base_of, describe_base
from iconformer_mm.checkpoint.shards import empty_parameters, find_stored, load_shards
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.accounting import WeightsError

INDEX = 'model.safetensors.index.json'


def build(name='ViT'):
    return next(f for f in FAMILIES if f.name == name).build()


def write(folder, model, shards=3, prefix='', left_out=()):
    """A model's weights as others write them: shards and an index, without an own header."""
    names = [n for n in model.state_dict() if n not in left_out]
    placed = {}
    for number in range(shards):
        file = f'model-{number}.safetensors'
        part = names[number::shards]
        save_file({prefix + n: model.state_dict()[n].contiguous() for n in part}, folder / file)
        placed.update({prefix + n: file for n in part})
    (folder / INDEX).write_text(json.dumps(dict(metadata={}, weight_map=placed)))
    return folder / INDEX


@pytest.fixture
def base():
    torch.manual_seed(3)
    model = build()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize('frozen_dtype', [None, 'bfloat16', 'int8', 'nf4'])
def test_as_loaded_whole(base, frozen_dtype, tmp_path):
    if frozen_dtype in ('int8', 'nf4'):
        pytest.importorskip('torchao')
    index = write(tmp_path, base, prefix='module.backbone.')
    with empty_parameters():
        model = build()
    assert all(p.is_meta for p in model.parameters())
    inject(model, 'icon', frozen_dtype=frozen_dtype)
    assert load_shards(model, index, prefix='backbone') == []
    plain = build()
    plain.load_state_dict(base.state_dict())
    inject(plain, 'icon', frozen_dtype=frozen_dtype)
    for name, value in plain.state_dict().items():
        if 'adapter' in name:  # initialised by other random numbers
            value.copy_(model.state_dict()[name])
    own = model.state_dict()
    assert own.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert own[name].dtype == value.dtype and torch.equal(own[name], value), name  # packed heads included
    assert describe_base(model) == describe_base(plain)
    assert base_difference(describe_base(base), base_of(model)) is None
    x = image((64, 64))
    model.eval()
    plain.eval()
    assert torch.equal(flatten(model(x))[0], flatten(plain(x))[0])
    assert get_injection(model).accounts[''].missing == []
    flatten(model(x))[0].sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters() if p.requires_grad)


def test_buffers_that_no_file_holds_are_computed(tmp_path):
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.tied = self.linear
            self.register_buffer('angles', torch.arange(3).float(), persistent=False)
            self.register_buffer('kept', torch.zeros(2))

    host = Host()
    host.kept.fill_(4)
    save_file({n: v.clone() for n, v in host.state_dict().items() if 'tied' not in n}, tmp_path / 'one.safetensors')
    with empty_parameters():
        empty = Host()
    load_shards(empty, tmp_path / 'one.safetensors')
    assert empty.angles.tolist() == [0, 1, 2] and empty.kept.tolist() == [4, 4]
    assert empty.tied.weight is empty.linear.weight and torch.equal(empty.linear.weight, host.linear.weight)
    assert nn.Linear(2, 2).weight.device.type == 'cpu'  # the context has ended

    class Derived(Host):
        def __init__(self):
            super().__init__()
            self.register_buffer('copied', self.linear.weight.detach() * 2, persistent=False)

    with empty_parameters():
        derived = Derived()
    with pytest.raises(WeightsError, match='have no values, such as copied'):
        load_shards(derived, tmp_path / 'one.safetensors')


def test_output_norms_that_the_weights_lack_are_trained(base, tmp_path):
    norms = [n for n in base.state_dict() if n.startswith('ln1.')]
    index = write(tmp_path, base, left_out=norms)
    with empty_parameters():
        model = build()
    inject(model, 'icon', frozen_dtype='bfloat16')
    load_shards(model, index)
    assert model.ln1.weight.tolist() == [1] * 32 and all(p.requires_grad for p in model.ln1.parameters())
    assert get_injection(model).trained_norms() == sorted(norms)


def damage(folder, index, kind):
    content = json.loads(index.read_text())
    names = content['weight_map']
    first = sorted(names)[0]
    if kind == 'truncated':
        shard = folder / 'model-1.safetensors'
        shard.write_bytes(shard.read_bytes()[:-64])
    elif kind == 'missing shard':
        (folder / 'model-1.safetensors').unlink()
    elif kind == 'outside':
        names[first] = '../model-0.safetensors'
    elif kind == 'absolute':
        names[first] = str(folder / 'model-0.safetensors')
    elif kind == 'not in shard':
        names['blocks.x'] = 'model-0.safetensors'
    elif kind == 'missing tensor':
        del names['layers.0.attn.qkv.weight']
    elif kind == 'shape':
        shard = folder / names['layers.0.attn.qkv.weight']
        tensors = load_file(shard)
        tensors['layers.0.attn.qkv.weight'] = torch.zeros(2, 2)
        save_file(tensors, shard)
    elif kind == 'no index':
        content = ['weights']
    index.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ('kind', 'error', 'message'),
    [
        ('truncated', DamagedFileError, r'model-1\.safetensors is not a valid safetensors file.*truncated'),
        ('missing shard', FileNotFoundError, r'names the shard model-1\.safetensors, which is not in'),
        ('outside', DamagedFileError, "names the file '../model-0.safetensors'. Shards must be"),
        ('absolute', DamagedFileError, 'Shards must be .safetensors files in the folder of the index'),
        ('not in shard', DamagedFileError, 'does not belong to its shards: blocks.x is not in model-0.safetensors'),
        ('missing tensor', WeightsError, r'lacks 1 tensors of VisionTransformer, such as layers\.0\.attn\.qkv\.weight'),
        ('shape', WeightsError, r'layers\.0\.attn\.qkv\.weight has shape \(2, 2\), the model \(96, 32\)'),
        ('no index', DamagedFileError, 'is not an index of shards'),
    ],
)
def test_damaged_files_are_refused_before_anything_is_read(base, kind, error, message, tmp_path):
    index = write(tmp_path, base)
    damage(tmp_path, index, kind)
    with empty_parameters():
        model = build()
    inject(model, 'icon')
    with pytest.raises(error, match=message):
        load_shards(model, index)
    assert all(p.is_meta for n, p in model.named_parameters() if 'adapter' not in n)


def test_a_wrong_prefix_is_refused(base, tmp_path):
    index = write(tmp_path, base)
    with pytest.raises(WeightsError, match="no names with the prefix 'encoder.'"):
        load_shards(build(), index, prefix='encoder')


def test_adapters_without_values_are_refused(base, tmp_path):
    with empty_parameters():
        model = build()
    with torch.device('meta'):
        inject(model, 'lora')
    with pytest.raises(WeightsError, match='has no values, and .* does not hold it. Build the base in'):
        load_shards(model, write(tmp_path, base))


def test_only_the_header_is_read_to_list_tensors(base, tmp_path):
    stored = find_stored(write(tmp_path, base, shards=2))
    assert stored.keys() == base.state_dict().keys()
    assert all(place.shape == base.state_dict()[name].shape for name, place in stored.items())
