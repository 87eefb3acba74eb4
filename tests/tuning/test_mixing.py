"""One batch, many adapters: the truth is one adapter at a time."""

import copy
import pickle
import random
import threading

import pytest
import torch
from families import FAMILIES, MORE_FAMILIES, VIT, flatten, image, stir
from torch import nn

from iconformer_mm import add_adapter, delete_adapter, disabled, inject, merge, mixed, remove, set_adapter
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.attachments import mixed as mixed_blocks

# Of some two that run as one product; test_stacked.py has two of each.
METHODS = {
    'icon': dict(type='icon', bottleneck=8),
    'icon, scaled': dict(type='icon', bottleneck=8, scale=0.5),
    'icon-static': dict(type='icon-static', bottleneck=8),
    'adaptformer': dict(type='adaptformer', bottleneck=4),
    'adapter': dict(type='adapter', bottleneck=4),
    'adapter, more': dict(type='adapter', bottleneck=4, scale=2.0),
    'convpass': 'convpass',
    'lorand': 'lorand',
    'mona': dict(type='mona', bottleneck=8),
    'lora': dict(type='lora', rank=2),
    'dora': dict(type='dora', rank=2),
    'frozen': 'frozen',
}
# Whose blocks read a weight of attention, such as those with nn.MultiheadAttention.
READ = ('BEiT', 'SwinV2', 'timm SwinV2 features', 'mmdet PVT', 'mmdet PVTv2', 'mmseg ViT', 'mmseg ViT no class token')
READ += ('mmseg BEiT', 'mmseg MAE', 'mmseg MiT', 'mmseg Twins PCPVT')


def add(model, name, method, **options):
    """Add an adapter with values as training would give it."""
    add_adapter(model, name, method, **options)
    generator = torch.Generator().manual_seed(len(get_injection(model).adapters))
    with torch.no_grad():
        for _, module in get_injection(model).adapters[name].modules():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def one_by_one(model, run, adapters):
    """What each sample gives with its adapter alone."""
    active = get_injection(model).active
    outputs = []
    for number, name in enumerate(adapters):
        if name is None:
            with disabled(model):
                outputs.append(run(model, number))
        else:
            set_adapter(model, name)
            outputs.append(run(model, number))
            set_adapter(model, active)
    return outputs


def assert_as_one_by_one(model, x, adapters):
    """The features of a mixed batch are those of the same batch with one adapter at a time."""
    with mixed(model, adapters):
        found = flatten(model(x))
    names = list(dict.fromkeys(adapters))
    whole = dict(zip(names, one_by_one(model, lambda model, i: flatten(model(x)), names)))
    for index, tensor in enumerate(found):
        expected = torch.stack([whole[name][index][number] for number, name in enumerate(adapters)])
        within = (1e-6 if x.dtype == torch.float32 else 1e-12) * max(1, expected.abs().max().item())
        torch.testing.assert_close(tensor, expected, rtol=0, atol=within)


def build(family):
    torch.manual_seed(0)
    model = family.build()
    model.eval()
    return model


@pytest.mark.parametrize('family', FAMILIES, ids=str)
def test_every_method_in_one_batch(family):
    model = build(family)
    refused = set()
    for name, method in METHODS.items():
        add(model, name, method)
        try:
            mixed(model, [name])
        except ValueError as error:
            assert 'read the weight' in str(error) and 'Predict with one adapter at a time' in str(error)
            refused.add(name)
    assert {name.partition(',')[0] for name in refused} == ({'lora', 'dora'} if family.name in READ else set())
    kept = [name for name in METHODS if name not in refused]
    adapters = [None, *kept, *random.Random(0).choices(kept, k=2)]
    random.Random(1).shuffle(adapters)
    # The last size is no square. Pyramids pad it.
    assert_as_one_by_one(model, image(family.sizes[-1], len(adapters)), adapters)


@pytest.mark.parametrize('family', MORE_FAMILIES, ids=str)
def test_further_blocks(family):
    model, names = build(family), []
    dtype = torch.float32 if family.name in ('XCiT', 'EdgeNeXt') else torch.float64  # these compute positions in float
    model.to(dtype)
    for name in ('icon', 'adapter', 'adapter, more', 'lora'):
        try:
            add(model, name, METHODS[name])
            mixed(model, [name])
        except ValueError as error:  # of inject, where the method has no place; those of mixed() are named
            assert 'cannot be mixed' not in str(error) or 'read the weight' in str(error)
            continue
        names.append(name)
    assert 'adapter' in names
    adapters = [*names, None]
    assert_as_one_by_one(model, image(family.sizes[-1], len(adapters)).to(dtype), adapters)


def test_methods_that_all_samples_share_are_refused():
    model, cannot = build(FAMILIES[0]), {}
    for name in sorted(set(PEFT_METHODS.module_dict) - {'full'}):
        add_adapter(model, name, name)
        try:
            mixed(model, [name])
        except ValueError as error:
            cannot[name] = str(error)
    assert set(cannot) == {'ssf', 'bitfit', 'norm', 'partial', 'vpt'}
    assert "'vpt' cannot be mixed with others in one batch: method 'vpt': it adds tokens" in cannot['vpt']
    assert "method 'ssf': it runs modules with other weights, which all samples of a batch share" in cannot['ssf']


@pytest.mark.parametrize('name', ['BEiT', 'mmseg ViT', 'SwinV2'])
def test_paths_beside_the_ffn_of_blocks_that_read_a_weight_of_attention(name):
    model = build(next(family for family in FAMILIES if family.name == name))
    for name, method in dict(a='lora', b='dora', c='lora').items():
        add(model, name, dict(type=method, rank=2, targets=['fc1', 'fc2']))
    assert_as_one_by_one(model, image((64, 64), 5), ['b', None, 'c', 'a', 'a'])


def test_adapters_in_some_blocks():
    """Groups whose samples are not neighbours, and blocks where no adapter of the batch acts."""
    model = build(FAMILIES[8])
    options = dict(method=dict(type='icon', bottleneck=4))
    for name, blocks in dict(a='all', b='last:2', c='all', d='first:1', e=[1]).items():
        add(model, name, options['method'], blocks=blocks)
    add(model, 'f', 'lora', blocks='last:1')
    for adapters in (['a', 'b', 'c', 'd', 'e', None, 'f'], ['d', 'e'], ['b', 'b', None], [None, None]):
        assert_as_one_by_one(model, image((64, 64), len(adapters)), adapters)


def test_one_adapter_is_exact_and_the_base_runs_once(monkeypatch):
    model = build(FAMILIES[0])
    add(model, 'a', METHODS['icon'])
    add(model, 'b', METHODS['adaptformer'])
    x = image((64, 64), 4)
    calls = []
    original = type(model.patch_embed).forward
    monkeypatch.setattr(type(model.patch_embed), 'forward', lambda self, x: calls.append(len(x)) or original(self, x))
    with torch.no_grad():
        expected = flatten(model(x))
    with mixed(model, ['a'] * 4) as batch:
        assert all(torch.equal(a, b) for a, b in zip(flatten(model(x)), expected, strict=True))
        flatten(model(x))
    assert calls == [4, 2, 4, 4]  # two samples show once that the order of samples is kept
    assert batch.adapters == ('a',) * 4
    with mixed(model, ['a', 'b', None, 'b']):
        model(x)
    assert calls[4:] == [2, 4]  # where 'b' acts, too


def test_weights_are_stacked_once(monkeypatch):
    model = build(FAMILIES[0])
    for name in 'abc':
        add(model, name, METHODS['icon'])
    made = []
    original = mixed_blocks.stack
    monkeypatch.setattr(mixed_blocks, 'stack', lambda *args: made.append(args) or original(*args))
    batch = mixed(model, ['a', 'b', 'c', 'a'])
    assert len(made) == 2  # one for each block
    for seed in range(2):
        x = image((64, 64), 4, seed=seed)
        with batch:
            found = flatten(model(x))[0]
        alone = one_by_one(model, lambda model, i, x=x: flatten(model(x[i : i + 1]))[0], batch.adapters)
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-6, atol=1e-6)
    assert len(made) == 2


def classifier(num_classes=10, **backbone):
    from mmpretrain.models import build_classifier

    torch.manual_seed(0)
    return build_classifier(
        dict(
            type='ImageClassifier',
            backbone=dict(type='VisionTransformer', arch=VIT, img_size=64, **backbone),
            neck=dict(type='ClsBatchNormNeck', input_features=32),
            head=dict(type='LinearClsHead', num_classes=num_classes, in_channels=32),
        )
    )


def with_heads():
    """A classifier with adapters whose heads have other classes."""
    model = classifier()
    add(model, 'ten', 'icon')
    for name, method, classes in (('five', 'icon', 5), ('three', 'adapter', 3), ('also ten', 'icon', 10)):
        head = dict(type='LinearClsHead', num_classes=classes, in_channels=32)
        add(model, name, method, parts=dict(head=head))
        neck = get_injection(model).adapters[name].parts['neck']
        neck.bn.running_mean.add_(0.1 * classes)
    return model.eval()


def samples(count):
    from mmpretrain.structures import DataSample

    return [DataSample(metainfo=dict(number=number, img_shape=(64, 64))) for number in range(count)]


def test_each_sample_has_its_neck_and_head():
    model = with_heads()
    adapters = ['five', 'ten', None, 'three', 'five', 'also ten']
    x = image((64, 64), len(adapters))
    with mixed(model, adapters):
        found = model(x, samples(len(x)), mode='predict')
    assert [sample.number for sample in found] == list(range(len(x)))
    assert [len(sample.pred_score) for sample in found] == [5, 10, 10, 3, 5, 10]
    alone = one_by_one(model, lambda model, i: model(x[i : i + 1], mode='predict')[0].pred_score, adapters)
    for sample, expected in zip(found, alone):
        torch.testing.assert_close(sample.pred_score, expected, rtol=0, atol=1e-6)
    same = ['ten', 'also ten', 'ten']
    with mixed(model, same):
        scores = model(x[:3])
    alone = one_by_one(model, lambda model, i: model(x[i : i + 1]), same)
    for tensor, *expected in zip(flatten(scores), *map(flatten, alone)):
        torch.testing.assert_close(tensor, torch.cat(expected), rtol=0, atol=1e-6)


def test_a_classifier_within_the_backbone():
    import timm

    torch.manual_seed(0)
    options = dict(img_size=64, embed_dim=32, depth=2, num_heads=2, num_classes=4)
    model = timm.create_model('vit_tiny_patch16_224', **options).eval()
    add(model, 'a', 'icon')
    add(model, 'b', 'icon', parts=dict(head=nn.Linear(32, 4)))
    add(model, 'c', 'icon', parts=dict(head=nn.Linear(32, 7)))
    model.eval()
    assert_as_one_by_one(model, image((64, 64), 4), ['b', 'a', None, 'b'])
    with mixed(model, ['a', 'c']), pytest.raises(ValueError, match='classifiers of these adapters lie in the backbone'):
        model(image((64, 64), 2))
    delete_adapter(model, 'b')
    assert_as_one_by_one(model, image((64, 64), 2), [None, 'a'])


def test_threads_have_mixtures_of_their_own():
    model = with_heads()
    x = image((64, 64), 4)
    plans = [['five', 'ten', None, 'three'], ['ten'] * 4, ['three', 'five', 'five', 'also ten'], None]

    def run(adapters):
        with torch.no_grad():
            if adapters is None:
                return [sample.pred_score for sample in model(x, mode='predict')]
        with mixed(model, adapters):
            return [sample.pred_score for sample in model(x, mode='predict')]

    expected = [run(adapters) for adapters in plans]
    wrong = []

    def work(index):
        for _ in range(5):
            if not all(torch.equal(a, b) for a, b in zip(run(plans[index]), expected[index], strict=True)):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def state_of(model):
    """All that modules hold, by identity."""
    return {
        name: {key: (id(value), dict(value) if isinstance(value, dict) else None) for key, value in vars(m).items()}
        for name, m in model.named_modules()
    }


def test_a_forward_pass_writes_nothing_on_modules():
    model = with_heads()
    batch = mixed(model, ['five', 'ten', None, 'three'])
    before = state_of(model)
    for _ in range(2):
        with batch:
            model(image((64, 64), 4), mode='predict')
    assert state_of(model) == before


def test_contexts_nest():
    model = build(FAMILIES[0])
    add(model, 'a', 'icon')
    add(model, 'b', 'icon')
    x = image((64, 64), 2)
    with torch.no_grad():
        active = flatten(model(x))[0]
        with disabled(model):
            base = flatten(model(x))[0]
    batch = mixed(model, ['b', 'a'])
    with batch:
        mixture = flatten(model(x))[0]
        with disabled(model):
            assert torch.equal(flatten(model(x))[0], base)
        with mixed(model, ['a', 'a']):
            assert torch.equal(flatten(model(x))[0], active)
        with batch:
            assert torch.equal(flatten(model(x))[0], mixture)
        assert torch.equal(flatten(model(x))[0], mixture)
    with disabled(model), batch:
        assert torch.equal(flatten(model(x))[0], mixture)
    with torch.no_grad():
        assert torch.equal(flatten(model(x))[0], active) and not torch.equal(mixture, active)
    assert torch.is_grad_enabled()


def test_copies_and_removal():
    model = with_heads()
    x, adapters = image((64, 64), 3), ['five', 'ten', 'three']

    def scores(model):
        with mixed(model, adapters):
            return [sample.pred_score for sample in model(x, mode='predict')]

    expected = scores(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        assert all(torch.equal(a, b) for a, b in zip(scores(twin), expected))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.div_(2)
    remove(model)
    assert not [name for name, module in model.named_modules() if 'forward' in vars(module)]
    assert [len(sample.pred_score) for sample in model(x, mode='predict')] == [10] * 3


@pytest.mark.parametrize('name', ['ViT', 'Swin'])
def test_half_precision(name):
    """As far from one adapter at a time as bfloat16 is."""
    family = next(family for family in FAMILIES if family.name == name)
    model = build(family)
    inject(model, 'icon', frozen_dtype='bfloat16')
    stir(model)
    add(model, 'b', 'icon')
    add(model, 'c', 'lora')
    x, adapters = image((64, 64), 3), ['b', 'default', 'c']
    with mixed(model, adapters):
        found = flatten(model(x))
    alone = one_by_one(model, lambda model, i: flatten(model(x[i : i + 1])), adapters)
    for tensor, *expected in zip(found, *alone):
        torch.testing.assert_close(tensor, torch.cat(expected), rtol=0.05, atol=0.05)


@pytest.mark.parametrize('name', ['ViT', 'Swin'])
def test_over_a_quantised_base(name):
    """DoRA computes its factors from packed weights, too."""
    pytest.importorskip('torchao', reason='the original stack has none')
    model = build(next(family for family in FAMILIES if family.name == name))
    inject(model, 'frozen', frozen_dtype='int8')
    for key, method in METHODS.items():
        add(model, key, method)
    adapters = [*METHODS, 'dora', None]
    x = image((64, 64), len(adapters))
    with mixed(model, adapters):
        found = flatten(model(x))
    alone = one_by_one(model, lambda model, i: flatten(model(x)), adapters)
    for index, tensor in enumerate(found):
        expected = torch.stack([outputs[index][number] for number, outputs in enumerate(alone)])
        torch.testing.assert_close(tensor, expected, rtol=0.05, atol=0.05)  # products are in bfloat16


class Block(nn.Module):
    """A block of a family of one's own."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm2, self.ffn = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class WindowedBlock(Block):
    """Its FFN sees windows, those of all samples at one place after the other."""

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        windows = self.norm2(x).unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)
        return x + self.ffn(windows).unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2)


class Host(nn.Module):
    def __init__(self, block, reorder):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.reorder = reorder

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = self.reorder(block(x))
        return x


@pytest.mark.parametrize(
    ('block', 'reorder', 'method'),
    [
        (Block, lambda x: x.flip(0), 'adaptformer'),
        (Block, lambda x: torch.cat((x, x)), 'adaptformer'),
        (Block, lambda x: x - x.mean(0), 'adaptformer'),
        (WindowedBlock, lambda x: x, dict(type='lora', targets=['fc1'])),
    ],
    ids=['reversed', 'doubled', 'mixed', 'windows'],
)
def test_models_that_mix_up_samples_are_refused(block, reorder, method):
    from iconformer_mm.tuning.families import FAMILIES as KNOWN
    from iconformer_mm.tuning.families import BlockFamily, FromSquare

    before = list(KNOWN)
    try:
        family = BlockFamily('own', f'{block.__module__}.{block.__name__}', FromSquare(), 'norm2')
        model = Host(block, reorder)
        inject(model, method, families=[family])
        plain = Host(Block, lambda x: x)
        inject(plain, 'adaptformer', families=[BlockFamily('plain', f'{__name__}.Block', FromSquare(), 'norm2')])
    finally:
        KNOWN[:] = before
    with (
        mixed(model.eval(), ['default', None]),
        pytest.raises(ValueError, match='Host mixes up the samples of a batch'),
    ):
        model(image((16, 16)))
    stir(plain)
    assert_as_one_by_one(plain.eval(), image((16, 16)), [None, 'default'])


@pytest.mark.parametrize(
    ('adapters', 'message'),
    [
        (['ten', 'six'], "there is no adapter 'six'; there are: ten, five, three, also ten"),
        ([], r'adapters must be a list with one name, or None, for each sample, got \[\]'),
        ('ten', "adapters must be a list with one name, or None, for each sample, got 'ten'"),
        (['ten', 3], 'for each sample, got 3 in it'),
    ],
)
def test_wrong_names(adapters, message):
    with pytest.raises(ValueError, match=message):
        mixed(with_heads(), adapters)


def test_unadapted_and_merged_models_are_refused():
    model = classifier().eval()
    with pytest.raises(ValueError, match='ImageClassifier is not adapted: call inject or add_adapter first'):
        mixed(model, ['a'])
    inject(model, 'lora')
    merge(model)
    with pytest.raises(ValueError, match="the adapter 'default' was merged into the base weights, which all samples"):
        mixed(model, ['default'])
    model = classifier().eval()
    inject(model, 'icon', unfreeze=['cls_token'])
    with pytest.raises(ValueError, match='a sample without an adapter needs the base as it was, but cls_token'):
        mixed(model, [None, 'default'])


def differently_sized(count):
    some = samples(count)
    some[1].set_metainfo(dict(img_shape=(32, 64)))
    return some


@pytest.mark.parametrize(
    ('act', 'message'),
    [
        (lambda m, x: m(x[:2], mode='predict'), 'mixed.. was given 3 adapters for a batch of 2: give one for each'),
        (lambda m, x: m(x, samples(2), mode='predict'), '2 data samples were given for 3 images'),
        (lambda m, x: m(x, differently_sized(3), mode='predict'), r'must have one size, got \(32, 64\), \(64, 64\)'),
        (lambda m, x: m([x[0], x[1], x[2, :, :32]], mode='predict'), r'must have one size, got \(3, 32, 64\)'),
        (lambda m, x: m(None, mode='predict'), 'ImageClassifier was called with a NoneType'),
        (lambda m, x: m(x, samples(3), mode='loss'), 'mixed.. is for prediction and computes no loss'),
        (lambda m, x: m.train()(x, mode='predict'), 'ImageClassifier is in training mode.*call model.eval.. first'),
        (lambda m, x: m(x), r'return tensors of several shapes, \[\(10,\)\], \[\(3,\)\], \[\(5,\)\]'),
        (lambda m, x: m.extract_feat(x), 'within mixed.. call the model itself'),
        (lambda m, x: m.backbone(x), 'For features, use mixed.model.backbone'),
        (lambda m, x: m.backbone.layers[0](x), 'blocks run only in a call of the whole backbone'),
        (lambda m, x: torch.enable_grad()(m)(x, mode='predict'), 'gradients were switched on within mixed'),
    ],
)
def test_wrong_calls(act, message):
    model = with_heads()
    with mixed(model, ['five', 'ten', 'three']), pytest.raises(ValueError, match=message):
        act(model, image((64, 64), 3))
    model.eval()
    with mixed(model, ['five', 'ten', 'three']):
        assert len(model(image((64, 64), 3), mode='predict')) == 3  # as if nothing had happened


def test_a_model_that_calls_its_backbone_several_times():
    """As models do that slide a window over the images, or flip them."""
    model = with_heads()
    original = type(model)

    class Sliding(original):
        def extract_feat(self, inputs, *args, **kwargs):
            views = (inputs, inputs[..., 32:], inputs.flip(3))
            return tuple(sum(each) for each in zip(*(super(Sliding, self).extract_feat(x) for x in views)))

    class Doubling(original):
        def extract_feat(self, inputs, *args, **kwargs):
            return super().extract_feat(torch.cat((inputs, inputs.flip(3))), *args, **kwargs)

    model.__class__ = Sliding
    adapters = ['five', 'ten', None, 'three', 'five']
    x = image((64, 64), len(adapters))
    alone = one_by_one(model, lambda model, i: model(x[i : i + 1], mode='predict')[0].pred_score, adapters)
    for _ in range(2):
        with mixed(model, adapters):
            found = model(x, samples(len(x)), mode='predict')
        assert [sample.number for sample in found] == list(range(len(x)))
        for sample, expected in zip(found, alone):
            torch.testing.assert_close(sample.pred_score, expected, rtol=0, atol=1e-6)
    model.__class__ = Doubling
    with mixed(model, ['five', 'ten']), pytest.raises(ValueError, match='given 2 adapters for a batch of 4'):
        model(image((64, 64)), mode='predict')


def test_a_plan_whose_adapters_changed_is_refused():
    model = with_heads()
    batch = mixed(model, ['five', 'ten'])
    with torch.no_grad():
        next(get_injection(model).adapters['five'].modules())[1].up.weight.add_(1)
    with pytest.raises(ValueError, match='weights of the adapters were changed after mixed.*call it again'):
        batch.__enter__()
    batch = mixed(model, ['five', 'ten'])
    delete_adapter(model, 'five')
    with pytest.raises(ValueError, match="the adapter 'five' was deleted or replaced after mixed"):
        batch.__enter__()
    add_adapter(model, 'new', 'icon')
    get_injection(model).adapters['new'].parts['neck'].train()
    with pytest.raises(ValueError, match="the adapter 'new' or its head is in training mode"):
        mixed(model, ['new', 'ten']).__enter__()
