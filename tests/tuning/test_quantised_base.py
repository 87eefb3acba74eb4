"""A base in 8 or 4 bits: what it computes, what it keeps, and how it is loaded, saved, merged and taken out."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, VIT, flatten, image, stir
from mmengine.model import BaseModule, ExponentialMovingAverage
from mmengine.registry import MODELS

from iconformer_mm import (
    add_adapter,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_adapter,
    summarize,
    unmerge,
)
from iconformer_mm.checkpoint import fingerprint, read_adapter
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.accounting import WeightsError
from iconformer_mm.tuning.packing import KINDS, Format
from iconformer_mm.tuning.quantised_weight import held_weights

pytest.importorskip('torchao', reason='the original stack has none; test_frozen_precision has its message')

ALL = [*FAMILIES, *MORE_FAMILIES]
METHODS = sorted(set(PEFT_METHODS.module_dict) - {'full', 'frozen'})
# They give a linear layer tensors with gaps, for which torch rounds once more before it adds the bias.
ROUNDED = ('timm PiT', 'T2T-ViT', 'XCiT', 'DaViT')
each_kind = pytest.mark.parametrize('kind', KINDS)


def family(name):
    return next(f for f in ALL if f.name == name)


def build(name='ViT', seed=0):
    torch.manual_seed(seed)
    model = family(name).build()
    model.eval()
    return model


def twin_of(model, base):
    """A float model with the values that a quantised one stands for, and the same adapters, to run under autocast.

    Args:
        model: The quantised model.
        base: The model as it was before, adapted in floating point.
    """
    held = dict(held_weights(model))
    state = model.state_dict()
    for name, parameter in base.named_parameters():
        parameter.data = held[name].unpacked() if name in held else state[name].clone()
    base.eval()
    return base


def loss_of(outputs):
    """A loss that depends on every value."""
    generator = torch.Generator().manual_seed(0)
    return sum((t.float() * torch.randn(t.shape, generator=generator)).mean() for t in outputs)


def compare_with_twin(name, method, kind):
    """Outputs and gradients of a quantised model and of its twin."""
    model, base = build(name), build(name)
    inject(model, method, frozen_dtype=kind)
    inject(base, method)
    stir(model).eval()
    twin = twin_of(model, base)
    assert len(dict(held_weights(model))) >= 4
    x = image(family(name).sizes[-1])
    outputs = flatten(model(x))
    with torch.autocast('cpu', torch.bfloat16):
        expected = flatten(twin(x))
    loss_of(outputs).backward()
    loss_of(expected).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    others = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert gradients.keys() == others.keys() and gradients
    pairs = [*zip(outputs, expected, strict=True), *((gradients[n], others[n]) for n in gradients)]
    return [(a.detach().float(), b.detach().float()) for a, b in pairs]


@pytest.mark.parametrize(('number', 'each'), list(enumerate(ALL)), ids=[str(f) for f in ALL])
def test_every_family_computes_what_the_dequantised_weights_do(number, each):
    """To the last bit, gradients included."""
    method = 'adaptformer' if each.name in ('PoolFormer', 'RIFormer') else 'icon'
    for got, expected in compare_with_twin(each.name, method, list(KINDS)[number % 3]):
        if each.name in ROUNDED:
            assert (got - expected).norm() <= 0.1 * expected.norm()
        else:
            assert torch.equal(got, expected)


HOSTS = ('ViT', 'BEiT', 'mmseg ViT')
PAIRS = [(name, method) for name in HOSTS for method in METHODS if (name, method) != ('BEiT', 'vpt')]


@pytest.mark.parametrize(('name', 'method'), PAIRS)
def test_every_method(name, method):
    """BEiT reads weights instead of calling layers; mmseg's ViT gives them to torch's attention."""
    for got, expected in compare_with_twin(name, method, list(KINDS)[METHODS.index(method) % 3]):
        assert torch.equal(got, expected)


@each_kind
def test_training_leaves_the_base_alone(kind):
    model = build()
    inject(model, 'lora', frozen_dtype=kind)
    model.train()
    base = {n: v.clone() for n, v in model.state_dict().items() if 'adapter' not in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(flatten(model(image((64, 64)))))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(model.state_dict()[n], v) for n, v in base.items())


@each_kind
@pytest.mark.parametrize('name', ['ViT', 'BEiT', 'mmseg ViT', 'mmseg MiT'])
def test_no_dequantised_weight_is_kept_for_the_backward_pass(name, kind, monkeypatch):
    model = build(name)
    inject(model, frozen_dtype=kind)
    unpack, made, kept = Format.unpack, [], []
    monkeypatch.setattr(Format, 'unpack', lambda *args: made.append(unpack(*args)) or made[-1])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = loss_of(flatten(model(image(family(name).sizes[0]))))
    assert len(made) >= len(dict(held_weights(model)))
    storages = {t.untyped_storage().data_ptr() for t in made}
    assert kept and not storages & {t.untyped_storage().data_ptr() for t in kept}
    count = len(made)
    out.backward()
    assert len(made) > count  # unpacked again


@each_kind
def test_matrices_beside_linear_layers_are_in_bfloat16(kind):
    model = build('Swin')
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    summary = inject(model, frozen_dtype=kind)
    held = dict(held_weights(model))
    assert {n.rpartition('.')[0].rpartition('.')[2] for n in held} >= {'qkv', 'proj', 'reduction', '0', '1'}
    for name, value in model.state_dict().items():
        if name in before:
            matrix = torch.uint8 if name in held else torch.bfloat16
            assert value.dtype == (matrix if before[name].dim() > 1 else torch.float32), name
    assert summary.backbone == sum(p.numel() for p in before.values())


@each_kind
def test_removal_gives_the_rounded_base_and_says_so(kind, logged):
    model = build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    inject(model, frozen_dtype=kind)
    held = {n: w.unpacked() for n, w in held_weights(model)}
    model.half()  # which rounds no packed weight
    model.float()
    remove(model)
    assert f'the base was held in {kind} and keeps the rounded values' in ' '.join(logged)
    assert list(dict(model.named_parameters())) == list(before)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert 'weight' not in vars(model.get_submodule(name.rpartition('.')[0]))
        if name in held:
            assert torch.equal(parameter, held[name]) and not torch.equal(parameter, before[name])


@each_kind
def test_copies_and_pickles_are_equal_and_apart(kind):
    model = stir(build_adapted(kind)).eval()
    x = image((64, 64))
    expected = flatten(model(x))[-1]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(flatten(twin(x))[-1], expected)
        next(iter(held_weights(twin)))[1].packed.zero_()
        assert torch.equal(flatten(model(x))[-1], expected)
        remove(twin)


def build_adapted(kind, seed=0, method='icon'):
    model = build(seed=seed)
    inject(model, method, frozen_dtype=kind)
    return model


def test_averages_follow():
    model = build_adapted('nf4')
    average = ExponentialMovingAverage(model, momentum=0.5)
    for step in range(2):
        stir(model, seed=step)
        average.update_parameters(model)
    name = 'layers.0.adapter_attention.up.weight'
    assert not torch.equal(average.module.get_parameter(name), model.get_parameter(name))
    for (_, a), (_, b) in zip(held_weights(average.module), held_weights(model), strict=True):
        assert torch.equal(a.packed, b.packed) and a.packed is not b.packed


def test_copies_that_follow_are_quantised_too():
    student = build()
    model = BaseModule()
    model.backbone, model.teacher = student, ExponentialMovingAverage(copy.deepcopy(student), momentum=0.5)
    inject(model, frozen_dtype='int8', backbones=['backbone'])
    assert len(dict(held_weights(model.teacher))) == len(dict(held_weights(model.backbone))) == 8
    stir(model.backbone)
    model.teacher.update_parameters(model.backbone)
    model.teacher.update_parameters(model.backbone)
    remove(model)
    assert not dict(held_weights(model))


@each_kind
def test_the_fingerprint_is_that_of_the_base_before(kind, tmp_path):
    base = build()
    expected = fingerprint(base)
    model = copy.deepcopy(base)
    inject(model, frozen_dtype=kind)
    assert fingerprint(model) == expected
    # Other weights, loaded in floating point after the injection.
    other = build(seed=1)
    model.load_state_dict(other.state_dict(), strict=False)
    assert fingerprint(model)[:32] == fingerprint(other)[:32]
    direct = copy.deepcopy(other)
    inject(direct, frozen_dtype=kind)
    for (_, a), (_, b) in zip(held_weights(model), held_weights(direct), strict=True):
        assert torch.equal(a.unpacked(), b.unpacked())
    # A packed state, which brings its fingerprint along.
    third = build_adapted(kind)
    third.load_state_dict(model.state_dict())
    assert fingerprint(third) == fingerprint(model)
    assert torch.equal(flatten(third(image((64, 64))))[-1], flatten(model(image((64, 64))))[-1])
    remove(model)
    assert fingerprint(model)[:32] != fingerprint(other)[:32]


def test_output_norms_that_the_weights_lack(tmp_path):
    """The fingerprint is then without them, as it is over a base in floating point."""
    base = {n: v for n, v in build('mmdet Swin', seed=1).state_dict().items() if not n.startswith('norm')}
    files = []
    for kind in (None, 'int8'):
        model = build('mmdet Swin')
        inject(model, frozen_dtype=kind)
        model.load_state_dict(base, strict=False)
        assert get_injection(model).trained_norms()
        files.append(tmp_path / f'{kind}.safetensors')
        save_adapter(model, files[-1])
    full, packed = (read_adapter(file)[0] for file in files)
    assert full['base_parameters'] == packed['base_parameters']
    assert full['base_fingerprint'][:32] == packed['base_fingerprint'][:32]
    load_adapter(model, files[0])


def test_adapter_files_say_the_precision(tmp_path, logged):
    x = image((64, 64))
    model = stir(build_adapted('int8')).eval()
    expected = flatten(model(x))[-1]
    save_adapter(model, tmp_path / 'a.safetensors')
    assert read_adapter(tmp_path / 'a.safetensors')[0]['base_dtype'] == 'int8'

    same = build()
    load_adapter(same, tmp_path / 'a.safetensors', frozen_dtype='int8')
    same.eval()
    assert torch.equal(flatten(same(x))[-1], expected) and 'was trained over' not in ' '.join(logged)

    for kind, words in ((None, 'full precision'), ('nf4', 'nf4'), ('bfloat16', 'bfloat16')):
        logged.clear()
        other = build()
        load_adapter(other, tmp_path / 'a.safetensors', frozen_dtype=kind)
        other.eval()
        assert f'was trained over a base in int8, and the model has a base in {words}' in ' '.join(logged)
        got = flatten(other(x))[-1]
        assert not torch.equal(got, expected) and (got - expected).norm() < 0.2 * expected.norm()

    logged.clear()
    save_adapter(other := stir(build_adapted(None)), tmp_path / 'b.safetensors')
    add_adapter(same, 'second', bottleneck=8)
    load_adapter(same, tmp_path / 'b.safetensors', name='third')
    set_adapter(same, 'third')
    assert 'was trained over a base in full precision, and the model has a base in int8' in ' '.join(logged)
    with pytest.raises(ValueError, match="frozen_dtype='nf4' holds the base of an unadapted model"):
        load_adapter(same, tmp_path / 'b.safetensors', frozen_dtype='nf4')


@each_kind
@pytest.mark.parametrize('method', ['lora', 'partial'])
def test_merge_by_option_and_back(method, kind):
    model = stir(build_adapted(kind, method=method)).eval()
    x = image((64, 64))
    adapted = flatten(model(x))[-1].detach()
    state = {n: v.clone() for n, v in model.state_dict().items()}
    before = fingerprint(model)
    with pytest.raises(ValueError, match=f'the base is held in {kind}, and merging .* dequantize=True'):
        merge(model)
    assert all(torch.equal(model.state_dict()[n], v) for n, v in state.items())
    merge(model, dequantize=True)
    model.eval()
    assert list(model.state_dict()) == list(build().state_dict())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (flatten(model(x))[-1] - adapted).norm() < 0.02 * adapted.norm()
    unmerge(model)
    model.eval()
    assert all(torch.equal(model.state_dict()[n], v) for n, v in state.items())
    assert torch.equal(flatten(model(x))[-1], adapted) and fingerprint(model) == before


class Classifier(BaseModule):
    """A model whose weights are initialised from the top, as MMEngine's runner does."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.head = torch.nn.Linear(32, 2)


@pytest.mark.parametrize('born', [False, True])
def test_initialisation_and_pre_trained_weights_come_in_floating_point(born, tmp_path):
    torch.manual_seed(1)
    config = dict(type='VisionTransformer', arch=VIT, img_size=64, out_type='raw')
    source = MODELS.build(config)
    torch.save(source.state_dict(), tmp_path / 'base.pth')
    config['init_cfg'] = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    if born:
        config.update(type='ICoNVisionTransformer', peft=dict(frozen_dtype='nf4'))
    model = Classifier(MODELS.build(config))
    if not born:
        inject(model, frozen_dtype='nf4')
    model.init_weights()
    direct = copy.deepcopy(source)
    inject(direct, frozen_dtype='nf4')
    held = dict(held_weights(model.backbone))
    assert held.keys() == dict(held_weights(direct)).keys()
    for name, weight in held_weights(direct):
        assert torch.equal(held[name].unpacked(), weight.unpacked()), name
    assert fingerprint(model)[:32] == fingerprint(source)[:32]
    before = model.state_dict()
    model.init_weights()  # does nothing, and must round nothing again
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_random_initialisation_is_quantised():
    model = Classifier(build())
    inject(model, frozen_dtype='int8')
    before = {n: w.unpacked() for n, w in held_weights(model)}
    model.init_weights()
    changed = [n for n, w in held_weights(model) if not torch.equal(w.unpacked(), before[n])]
    assert changed and all(torch.isfinite(w.unpacked()).all() for _, w in held_weights(model))


@pytest.mark.parametrize(
    ('own', 'change', 'message'),
    [
        ('int8', lambda s: build_adapted('nf4').state_dict(), "hold the base in nf4, and the model's is in int8"),
        (None, lambda s: build_adapted('nf4').state_dict(), "hold the base in nf4, .* frozen_dtype='nf4'"),
        ('bfloat16', lambda s: build_adapted('int8').state_dict(), "hold the base in int8, .* frozen_dtype='int8'"),
        ('int8', lambda s: {n: v[:1] if n.endswith('qkv.weight') else v for n, v in s.items()}, 'another shape'),
        ('int8', lambda s: {n: v * float('nan') for n, v in s.items()}, 'NaN or infinite values, which int8 cannot'),
        ('int8', lambda s: {n: v for n, v in s.items() if 'qkv' not in n}, 'frozen tensors are missing'),
    ],
)
def test_weights_that_do_not_fit(own, change, message):
    model = build_adapted(own)
    before = {n: v.clone() for n, v in model.state_dict().items() if 'qkv' in n}
    with pytest.raises((WeightsError, ValueError), match=message):
        model.load_state_dict(change(build().state_dict()), strict=False)
    if message not in ('another shape', 'frozen tensors are missing'):  # of which torch has loaded the rest
        assert all(torch.equal(model.state_dict()[n], v) for n, v in before.items())


def test_a_base_of_two_files_has_no_fingerprint():
    model = build_adapted('int8')
    packed, other = model.state_dict(), build(seed=1).state_dict()
    name = 'layers.0.attn.qkv.weight'
    model.load_state_dict({**packed, name: other[name]})
    with pytest.raises(ValueError, match='its fingerprint before that is not known'):
        save_adapter(model, 'never.safetensors')


def test_trained_layers_are_not_quantised():
    model = build()
    inject(model, frozen_dtype='int8', unfreeze=['layers.1.ffn.*'])
    held = dict(held_weights(model))
    assert len(held) == 6 and not any('layers.1.ffn' in name for name in held)
    assert model.get_parameter('layers.1.ffn.layers.1.weight').dtype == torch.float32
    loss_of(flatten(model(image((64, 64))))).backward()
    assert model.get_parameter('layers.1.ffn.layers.1.weight').grad is not None


@pytest.mark.parametrize(
    'write',
    [
        torch.nn.init.normal_,
        torch.nn.init.trunc_normal_,
        lambda w: w.data,
        lambda w: w.copy_(torch.zeros(w.shape)),
        lambda w: torch.nn.init.constant_(w, 0),
    ],
)
def test_weights_cannot_be_written_to(write):
    with pytest.raises(RuntimeError, match='would write to a weight that is held in int8'):
        write(build_adapted('int8').layers[0].attn.qkv.weight)


def test_weights_are_read_like_tensors():
    model = build_adapted('float8')
    weight = model.layers[0].attn.qkv.weight
    value = weight.unpacked()
    assert (weight.shape, weight.ndim, weight.dim(), len(weight)) == (value.shape, 2, 2, 96)
    assert (weight.size(), weight.size(1), weight.numel(), weight.dtype) == (value.shape, 32, 3072, torch.float32)
    for read in (
        lambda w: w * 2,
        lambda w: 1 + w,
        lambda w: w @ torch.ones(32, 1),
        lambda w: torch.ones(1, 96) @ w,
        lambda w: w[3:5],
        lambda w: w.t(),
        lambda w: torch.cat([w, w]),
        lambda w: w.detach().norm(dim=1),
        lambda w: torch.nn.functional.linear(torch.ones(32), w),
    ):
        assert torch.equal(read(weight), read(value))
    assert 'float8' in repr(weight)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for options in ({}, dict(with_cp=True)):
        model = build()
        inject(model, frozen_dtype='nf4', **options)
        stir(model).train()
        loss_of(flatten(model(image((64, 64))))).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@each_kind
def test_compiled_code_computes_the_same(kind):
    """With the compiler's tracing and its own gradients, but no generated code, which takes minutes."""
    model = build()
    inject(model, dict(type='icon', bottleneck=8), frozen_dtype=kind)
    stir(model)
    results = []
    for call in (model, torch.compile(model, backend='aot_eager')):
        out = flatten(call(image((64, 64))))
        sum(each.sum() for each in out).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
        model.zero_grad()
        results.append([*out, *gradients])
    assert len(results[0]) == len(results[1]) > 10
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


def test_sound_weights_are_needed():
    model = build()
    model.layers[1].ffn.layers[1].weight.data[0, 0] = float('inf')
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r'layers.1.ffn.layers.1.weight has NaN or infinite values, which nf4'):
        inject(model, frozen_dtype='nf4')
    assert list(model.state_dict()) == keys and summarize(model).method is None


def test_several_backbones_are_refused():
    model = torch.nn.Module()
    model.first, model.second = build(), build('Swin')
    with pytest.raises(ValueError, match="frozen_dtype='int8' holds one backbone, and 'first', 'second' are"):
        inject(model, frozen_dtype='int8', backbones=['first', 'second'])
    inject(model, frozen_dtype='bfloat16', backbones=['first', 'second'])


def test_an_error_leaves_the_base_as_it_was(tmp_path, logged):
    """Also one that shows after the adapters are in place."""
    model = Classifier(build())
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(ValueError, match='freeze'):
        inject(model, frozen_dtype='nf4', freeze=['neck.*'])
    donor = Classifier(build())
    donor.head = torch.nn.Linear(32, 3)
    inject(donor)
    save_adapter(donor, tmp_path / 'three.safetensors')
    with pytest.raises(ValueError, match='of another shape'):
        load_adapter(model, tmp_path / 'three.safetensors', frozen_dtype='nf4')
    assert 'rounded' not in ' '.join(logged)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
