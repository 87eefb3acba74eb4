"""Blocks, unfreeze and freeze: what they choose, and that it is kept."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, SWIN, VIT, flatten, image, stir
from torch import nn

from iconformer_mm import add_adapter, disabled, inject, load_adapter, merge, remove, save_adapter, summarize
from iconformer_mm.checkpoint import read_adapter
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.selection import Selection

DEEP = {**VIT, 'num_layers': 5}
METHODS = sorted(name for name in PEFT_METHODS.module_dict if name not in ('full', 'frozen'))


def vit(**options):
    from mmpretrain.models.backbones import VisionTransformer

    return VisionTransformer(**dict(dict(arch=DEEP, img_size=64, out_type='raw'), **options))


def swin(**options):
    from mmpretrain.models.backbones import SwinTransformer

    return SwinTransformer(arch=SWIN, img_size=64, pad_small_map=True, **options)


def classifier(**options):
    from mmpretrain.models import build_classifier

    backbone = dict(type='VisionTransformer', arch=DEEP, img_size=64, **options)
    return build_classifier(
        dict(type='ImageClassifier', backbone=backbone, head=dict(type='LinearClsHead', num_classes=3, in_channels=32))
    )


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapted_blocks(model):
    names = {name for name in model.state_dict() if is_adapter(name)}
    return sorted({int(name.split('.')[1]) for name in names})


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize(
    ('blocks', 'expected'),
    [
        ('last:2', [3, 4]),
        ('first:2', [0, 1]),
        ([0, 1], [0, 1]),
        ([-1, 'layers.3'], [3, 4]),
        (['layers.[23]', 'last:1'], [2, 3, 4]),
        (range(1, 3), [1, 2]),
    ],
)
def test_blocks(method, blocks, expected):
    model = vit()
    summary = inject(model, method, blocks=blocks)
    if method == 'partial':  # the last of those chosen
        expected = expected[-1:]
    assert adapted_blocks(model) == expected
    assert all(name.startswith('layers.') for name in trained(model))  # nothing outside of blocks
    assert summary.num_sites >= len(expected)
    assert trained(model) == {n for n, _ in model.named_parameters() if is_adapter(n)}


@pytest.mark.parametrize('blocks', ['stage:2', 'stages.2', ['stages.2.blocks.0', 'stages.2.blocks.1'], [2, 3]])
def test_stages_of_a_pyramid(blocks):
    summary = inject(swin(), blocks=blocks)
    assert summary.sites == {'mmpretrain Swin': ['stages.2.blocks.0', 'stages.2.blocks.1']}


@pytest.mark.parametrize('family', [f for f in FAMILIES if f.stride is None], ids=str)
def test_every_pyramid_has_stages(family):
    names = []
    for stage in range(4):
        model = family.build()
        names += sum(inject(model, blocks=f'stage:{stage}').sites.values(), [])
    assert names == sum(inject(family.build()).sites.values(), []) or sorted(names) == sorted(
        sum(inject(family.build()).sites.values(), [])
    )


@pytest.mark.parametrize(
    ('blocks', 'message'),
    [
        ('last:6', "there is no 'last:6'; VisionTransformer has 5 blocks, layers.0 to layers.4"),
        ('last:0', "there is no 'last:0'"),
        ('lats:2', "there is no 'lats:2'"),
        ('stage:1', "there is no 'stage:1'; VisionTransformer has 5 blocks"),
        ([5], 'there is no block 5'),
        ([-6], 'there is no block -6'),
        (['layer.3'], r"no block fits 'layer.3' \(did you mean 'layers.3'"),
        ([], 'blocks must be'),
        (3, 'blocks must be'),
        ([True], 'numbers or names'),
        ([1.0], 'numbers or names'),
        (None, 'blocks must be'),
    ],
)
def test_wrong_blocks(blocks, message):
    model = vit()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        inject(model, blocks=blocks)
    assert list(model.state_dict()) == keys and all(p.requires_grad for p in model.parameters())


def test_blocks_where_there_are_none_to_choose():
    from mmpretrain.models.backbones import ResNet

    with pytest.raises(ValueError, match='ResNet has no known Transformer blocks to choose among'):
        inject(ResNet(18), 'bitfit', blocks='last:1')
    with pytest.raises(ValueError, match="method 'frozen' adapts no blocks"):
        inject(vit(), 'frozen', blocks='last:1')
    with pytest.raises(ValueError, match='num_blocks is 3, but VisionTransformer has 2'):
        inject(vit(), 'partial', num_blocks=3, blocks='last:2')


def test_shallow_prompts_need_consecutive_blocks():
    with pytest.raises(ValueError, match='must be consecutive; got .*layers.0.*layers.2'):
        inject(vit(), 'vpt', deep=False, blocks=[0, 2])
    assert adapted_blocks(inject_into(vit(), 'vpt', deep=False, blocks=[1, 2])) == [1]


def inject_into(model, *args, **options):
    inject(model, *args, **options)
    return model


# Parameters of the base


def test_unfreeze_trains_what_it_names_and_nothing_else():
    model = vit()
    summary = inject(model, unfreeze=['patch_embed.*', 'cls_token', 'ln1'], bottleneck=4)
    named = {'patch_embed.projection.weight', 'patch_embed.projection.bias', 'cls_token', 'ln1.weight', 'ln1.bias'}
    assert {n for n in trained(model) if not is_adapter(n)} == named
    assert set(summary.unfrozen) == named and 'cls_token' in str(summary)
    injection = get_injection(model)
    assert injection.trains('cls_token') and not injection.trains('pos_embed')
    assert injection.trains('layers.0.adapter_attention.down.weight')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(unfreeze=['patch_embd.*']),
            r"unfreeze: no parameter of the backbone fits 'patch_embd.\*' \(did you mean",
        ),
        (dict(unfreeze=['head.*']), "no parameter of the backbone fits 'head"),
        (dict(unfreeze='norm*'), "unfreeze must be a list of patterns.*got 'norm"),
        (dict(freeze=['haed.*']), r"freeze: no parameter beside the backbone fits 'haed.\*' \(did you mean 'head'"),
        (dict(freeze=['backbone.*']), 'no parameter beside the backbone'),
        (dict(freeze=[1]), 'freeze must be a list'),
        (dict(method='full', unfreeze=['cls_token']), 'there is nothing to unfreeze'),
    ],
)
def test_patterns_that_fit_nothing(options, message):
    model = classifier()
    before = trained(model)
    with pytest.raises(ValueError, match=message):
        inject(model, **options)
    assert trained(model) == before and not any(map(is_adapter, model.state_dict()))


def train(model, steps=2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        flatten(model(image((64, 64), seed=step)))[0].square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize('way', ['plain', 'loaded', 'set', 'copied', 'pickled'])
def test_remove_gives_the_base_values_back(way):
    """Whatever was the base when training began."""
    model = vit()
    inject(model, unfreeze=['patch_embed', 'cls_token'], bottleneck=4)
    if way == 'loaded':
        torch.manual_seed(5)
        model.load_state_dict(vit().state_dict(), strict=False)
    elif way == 'set':
        nn.init.normal_(model.cls_token)
    base = {n: p.clone() for n, p in model.state_dict().items() if not is_adapter(n)}
    if way == 'copied':
        model = copy.deepcopy(model)
    elif way == 'pickled':
        model = pickle.loads(pickle.dumps(model))
    train(model)
    assert not torch.equal(model.cls_token, base['cls_token'])
    remove(model)
    assert model.state_dict().keys() == base.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, base[name]), name
    assert all(p.requires_grad for n, p in model.named_parameters() if n != 'pos_embed')


def test_remove_refuses_where_the_base_is_unknown():
    model = vit()
    inject(model, unfreeze=['cls_token'], bottleneck=4)
    train(model)
    torch.manual_seed(9)
    other = vit()
    inject(other, unfreeze=['cls_token'], bottleneck=4)
    other.load_state_dict(model.state_dict())  # a whole checkpoint, over another base
    with pytest.raises(ValueError, match='the base values of cls_token and others are unknown'):
        remove(other)
    assert any(map(is_adapter, other.state_dict()))


def test_merge_keeps_what_was_trained():
    model = vit()
    inject(model, 'lora', unfreeze=['cls_token'])
    train(model)
    x = image((64, 64))
    model.eval()
    expected, token = flatten(model(x)), model.cls_token.clone()
    merge(model)
    assert torch.equal(model.cls_token, token)
    for a, b in zip(flatten(model(x)), expected):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_base_in_training_is_not_shared():
    model = vit()
    inject(model, unfreeze=['cls_token'])
    with pytest.raises(ValueError, match='cls_token of it is trained in place'), disabled(model):
        pass
    with pytest.raises(ValueError, match='cls_token of it is trained in place'):
        add_adapter(model, 'other')


@pytest.mark.parametrize('method', ['icon', 'lora', 'frozen', 'bitfit'])
def test_files_hold_and_restore_the_selection(method, tmp_path):
    """A base with other input channels: its stem is trained, and no part of the fingerprint."""
    options = {} if method == 'frozen' else dict(blocks='last:2')
    model = classifier(in_channels=5)
    inject(model, method, unfreeze=['patch_embed.*'], freeze=['head.fc.bias'], **options)
    stir(model)
    nn.init.normal_(model.backbone.patch_embed.projection.weight)
    path = tmp_path / 'a.safetensors'
    save_adapter(model, path)
    content, tensors = read_adapter(path)
    assert content['selection'] == dict(unfreeze=['patch_embed.*'], freeze=['head.fc.bias'], **options)
    assert 'backbone.patch_embed.projection.weight' in tensors and 'head.fc.bias' in tensors
    assert 'patch_embed.projection.weight' not in content['base_parameters']

    torch.manual_seed(1)
    twin = classifier(in_channels=5)
    own = {n: v for n, v in model.state_dict().items() if n.startswith('backbone.') and 'patch_embed' not in n}
    twin.load_state_dict({n: v for n, v in own.items() if not is_adapter(n)}, strict=False)
    stem = twin.backbone.patch_embed.projection.weight.clone()
    load_adapter(twin, path)
    x = image((64, 64), channels=5)
    model.eval(), twin.eval()
    assert torch.equal(twin(x), model(x))
    assert trained(twin) == trained(model) and 'head.fc.bias' not in trained(twin)
    assert get_injection(twin).selection == get_injection(model).selection
    remove(twin)
    assert torch.equal(twin.backbone.patch_embed.projection.weight, stem)


def test_files_of_another_selection_are_refused(tmp_path):
    model = classifier()
    inject(model, blocks='last:2', bottleneck=4)
    path = tmp_path / 'a.safetensors'
    save_adapter(model, path)
    for options, message in (
        (dict(blocks='last:1'), r"trained with blocks='last:2', but the model is adapted with blocks='last:1'"),
        (dict(blocks='last:2', unfreeze=['cls_token']), r'unfreeze=\(\), but the model is adapted with'),
    ):
        remove(model)
        inject(model, bottleneck=4, **options)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, path)
    remove(model)
    inject(model, blocks=[3, 4], bottleneck=4)
    load_adapter(model, path)  # the same blocks, said otherwise


def test_files_of_several_backbones(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.rgb, self.depth, self.head = vit(), swin(), nn.Linear(32, 2)

    model = Two()
    inject(model, bottleneck=4, blocks='last:1', unfreeze=['cls_token'], backbones=['rgb', 'depth'])
    stir(model)
    path = tmp_path / 'a.safetensors'
    save_adapter(model, path)
    content, tensors = read_adapter(path)
    assert content['backbones'] == ['rgb', 'depth']
    assert 'rgb.cls_token' in tensors and 'head.weight' in tensors
    assert {n.split('.adapter')[0] for n in tensors if is_adapter(n)} == {'rgb.layers.4', 'depth.stages.3.blocks.0'}
    twin = Two()
    twin.load_state_dict({n: v for n, v in model.state_dict().items() if not is_adapter(n)})
    load_adapter(twin, path)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    with pytest.raises(ValueError, match="'rgb', 'depth' were adapted together: give the whole model"):
        save_adapter(model.rgb, path)


def test_a_selection_is_plain_data():
    selection = Selection(['stage:1', 3], ['a.*'], ['b'], ['x'])
    assert selection.config == dict(blocks=['stage:1', 3], unfreeze=['a.*'], freeze=['b'], backbones=['x'])
    assert Selection.from_config(selection.config) == selection
    assert Selection().config == {} and Selection.from_config(None) == Selection()
    for wrong in ([], {'block': 'all'}, {'unfreeze': 'a'}, {'blocks': {}}):
        with pytest.raises(ValueError):
            Selection.from_config(wrong)


# What stays as the caller set it


def test_requires_grad_stays_as_set():
    model = swin(frozen_stages=2)
    inject(model, bottleneck=4)
    teacher = copy.deepcopy(model)
    teacher.requires_grad_(False)
    for _ in range(2):
        teacher.eval(), teacher.train()
        assert not trained(teacher)
    model.stages[0].blocks[0].norm1.weight.requires_grad_(True)
    frozen = model.stages[1].blocks[0].adapter_attention.down.weight.requires_grad_(False)
    model.eval(), model.train()
    assert model.stages[0].blocks[0].norm1.weight.requires_grad and not frozen.requires_grad
    assert model.stages[0].blocks[0].adapter_attention.down.weight.requires_grad  # frozen_stages aside


def test_batch_norm_of_the_backbone():
    from mmpretrain.models.backbones import ResNet

    model = ResNet(18, norm_eval=False)
    inject(model, 'frozen', unfreeze=['layer4.1.bn2'])
    model.train()
    assert [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training] == ['layer4.1.bn2']
    assert 'layer4.1.bn2.running_mean' in get_injection(model).trained_names()
    model.bn1.train()  # the caller's word
    model.train()
    assert model.bn1.training
    model.eval()
    assert not model.bn1.training
    model.train()
    assert model.bn1.training and not model.layer1[0].bn1.training


def test_frozen_parts_keep_their_statistics():
    model = classifier()
    model.neck = nn.Sequential(nn.Linear(32, 4), nn.BatchNorm1d(4))
    before = trained(model)
    summary = inject(model, freeze=['neck.*'])
    assert summary.parts['neck'] == (0, 140) and not trained(model) & {'neck.0.weight', 'neck.1.weight'}
    model.train()
    assert model.neck.training and not model.neck[1].training
    twin = copy.deepcopy(model)
    twin.train()
    assert not twin.neck[1].training and twin.neck[1] is not model.neck[1]
    remove(model)
    assert trained(model) == before and model.neck[1].training
    model.eval()
    assert not model.neck[1].training
    assert summarize(twin).parts['neck'] == (0, 140)


def test_frozen_matrices_in_bfloat16_leave_trained_ones_alone():
    model = vit()
    inject(model, frozen_dtype='bfloat16', unfreeze=['patch_embed'])
    assert model.patch_embed.projection.weight.dtype == torch.float32
    assert model.layers[0].ffn.layers[1].weight.dtype == torch.bfloat16
