"""Frozen weights held in bfloat16."""

import copy

import pytest
import torch
from families import FAMILIES, SWIN, flatten, image, stir
from mmengine.registry import MODELS

from iconformer_mm import add_adapter, extras, inject, load_adapter, remove, save_adapter, set_adapter
from iconformer_mm.engine import PEFTHook
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning import packing

some = pytest.mark.parametrize('name', ['ViT', 'Swin', 'SwinV2', 'timm ViT'])


def family(name):
    return next(f for f in FAMILIES if f.name == name)


@some
def test_matrices_take_half_the_memory_and_adapters_do_not(name):
    model = family(name).build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inject(model, frozen_dtype='bfloat16')
    for n, p in model.named_parameters():
        expected = torch.bfloat16 if n in before and p.dim() > 1 else torch.float32
        assert p.dtype == expected, n
    remove(model)
    for n, p in model.named_parameters():
        assert p.dtype == torch.float32
        assert torch.equal(p, before[n].bfloat16().float() if p.dim() > 1 else before[n])


@some
def test_outputs_are_those_of_autocast(name):
    """Without autocast around it, and with it, as in training with AMP."""
    f = family(name)
    model = f.build()
    twin = copy.deepcopy(model)
    inject(model, frozen_dtype='bfloat16')
    inject(twin)
    model.eval(), twin.eval()
    x = image(f.sizes[1])
    with torch.autocast('cpu', torch.bfloat16):
        expected = flatten(twin(x))
        inside = flatten(model(x))
    outside = flatten(model(x))
    for a, b, c in zip(expected, inside, outside):
        # Vectors and sums may be rounded elsewhere: equal to bfloat16's 3 digits as a whole.
        assert (a.float() - b.float()).norm() < 0.02 * a.float().norm()
        assert (c - b.float()).norm() < 0.02 * c.norm()
        assert c.dtype == torch.float32


@pytest.mark.parametrize('method', sorted(set(PEFT_METHODS.module_dict) - {'full'}))
def test_every_method_trains(method):
    model = family('ViT').build()
    inject(model, method, frozen_dtype='bfloat16')
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if 'adapter' not in n}
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    out = flatten(model(image((64, 64))))[-1]
    if method == 'frozen':
        assert not trained and not out.requires_grad
        return
    assert all(p.dtype == torch.float32 for p in trained)
    out.square().mean().backward()
    torch.optim.AdamW(trained, lr=0.1).step()
    assert all(torch.isfinite(p).all() for p in trained) and any(p.grad.abs().sum() > 0 for p in trained)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_adapter_files_and_switching(tmp_path):
    """A file made over the base in single precision fits, and the other way round."""
    full = family('Swin').build()
    half = copy.deepcopy(full)
    for model, dtype in ((full, None), (half, 'bfloat16')):
        inject(model, frozen_dtype=dtype)
        stir(model).eval()
    save_adapter(full, tmp_path / 'full.safetensors')
    save_adapter(half, tmp_path / 'half.safetensors')
    load_adapter(half, tmp_path / 'full.safetensors')
    load_adapter(full, tmp_path / 'half.safetensors')
    add_adapter(half, 'other', bottleneck=8)
    set_adapter(half, 'other')
    assert {p.dtype for n, p in half.named_parameters() if 'adapter' in n} == {torch.float32}
    assert torch.isfinite(flatten(half(image((64, 64))))[-1]).all()


def test_born_adapted_backbones_take_it():
    config = dict(type='mmpretrain.ICoNSwinTransformer', arch=SWIN, img_size=64, pad_small_map=True)
    model = MODELS.build(dict(config, peft=dict(frozen_dtype='bfloat16')))
    assert model.stages[0].blocks[0].ffn.layers[1].weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ('method', 'dtype', 'message'),
    [
        ('icon', 'int16', r"one of 'bfloat16', 'int8', 'nf4', 'float8', got 'int16' \(did you mean 'int8'\?\)"),
        ('icon', 'fp8', r"got 'fp8'"),
        ('icon', 8, r'got 8'),
        ('full', 'bfloat16', "method 'full' freezes nothing"),
    ],
)
def test_mistakes_leave_the_model_alone(method, dtype, message):
    model = family('ViT').build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        inject(model, method, frozen_dtype=dtype)
    assert list(model.state_dict()) == keys
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ('versions', 'message'),
    [
        (dict(torch='2.1.2+cu121'), r'needs torch 2.5 or newer and torchao 0.18 or newer; this is torch 2.1.2\+cu121'),
        (dict(torchao=None), "frozen_dtype='nf4' needs torchao, which is not installed; install the extra 'quant'"),
        (dict(torchao='0.9.0'), "needs torchao 0.18 or newer, and 0.9.0 is installed; install the extra 'quant'"),
    ],
)
def test_what_is_missing_is_one_sentence(versions, message, monkeypatch, tmp_path):
    """Of torch and torchao, before anything is changed."""
    torchao = versions.get('torchao', '0.18.0')
    donor, file = family('ViT').build(), tmp_path / 'adapter.safetensors'
    inject(donor)
    save_adapter(donor, file)
    monkeypatch.setattr(torch, '__version__', versions.get('torch', '2.12.1'))
    monkeypatch.setattr(extras, 'find_spec', lambda name: None if torchao is None else name)
    monkeypatch.setattr(packing.metadata, 'version', lambda name: torchao)
    model = family('ViT').build()
    for call in (
        lambda: inject(model, frozen_dtype='nf4'),
        lambda: PEFTHook(frozen_dtype='nf4'),
        lambda: load_adapter(model, file, frozen_dtype='nf4'),
    ):
        with pytest.raises(extras.MissingExtraError, match=message):
            call()
    assert not any('adapter' in name for name in model.state_dict())
