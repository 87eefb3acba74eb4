"""``TIMMFeatures`` against timm's own blocks, listened to, and against timm's own loading."""

from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from mmengine.registry import init_default_scope
from safetensors.torch import load_file, save_file
from tiny_runs import build

from iconformer_mm import inject, remove, summarize
from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.checkpoint.reading import UntrustedFileError
from iconformer_mm.models.timm_features import TIMMFeatures
from iconformer_mm.tuning import get_injection

SMALL = dict(depth=3, embed_dim=32, num_heads=2)
STAGES = dict(depths=(1, 1, 1, 1), embed_dim=16, num_heads=(1, 2, 4, 8))
DINOV2, SWIN = 'vit_small_patch14_dinov2', 'swin_tiny_patch4_window7_224'
VITS = {
    'vit_tiny_patch16_224': 1,
    DINOV2: 1,
    'vit_small_patch14_reg4_dinov2': 5,
    'vit_small_patch16_dinov3': 5,
    'eva02_tiny_patch14_224': 1,
    'vit_base_patch16_siglip_224': 0,
}


def small(name, **options):
    sizes = dict(SMALL, embed_dim=48, num_heads=3) if 'eva02' in name else STAGES if 'swin' in name else SMALL
    return TIMMFeatures(name, **{'model_kwargs': sizes, **options}).eval()


def images(height=64, width=96, seed=0):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


def listened(model, x, blocks):
    """What blocks put out in timm's own forward pass."""
    heard = []
    handles = [block.register_forward_hook(lambda m, i, out: heard.append(out)) for block in blocks]
    model.forward_features(x)
    for handle in handles:
        handle.remove()
    return heard


@pytest.mark.parametrize('name', VITS)
def test_maps_are_the_blocks_outputs_as_maps(name):
    model = small(name, out_indices=(0, 2))
    patch, prefix = model.timm_model.patch_embed.patch_size[0], VITS[name]
    x = images(2 * patch, 3 * patch)
    maps = model(x)
    for features, tokens in zip(maps, listened(model.timm_model, x, [model.timm_model.blocks[i] for i in (0, 2)])):
        expected = tokens[:, prefix:].unflatten(1, (2, 3)).permute(0, 3, 1, 2)
        torch.testing.assert_close(features, expected)
    assert model.out_channels == (maps[0].shape[1],) * 2 and model.out_strides == (patch, patch)


@pytest.mark.parametrize('name', [SWIN, 'swinv2_tiny_window8_256'])
def test_stages_are_the_default_where_there_are_some(name):
    model = small(name)
    maps = model(images())
    assert [tuple(m.shape[1:]) for m in maps] == [(16, 16, 24), (32, 8, 12), (64, 4, 6), (128, 2, 3)]
    assert model.out_channels == (16, 32, 64, 128) and model.out_strides == (4, 8, 16, 32)
    for features, heard in zip(maps, listened(model.timm_model, images(), model.timm_model.layers)):
        torch.testing.assert_close(features, heard.permute(0, 3, 1, 2))


def test_a_convolutional_network_has_maps_too():
    assert [m.shape[1] for m in TIMMFeatures('resnet18', out_indices=(1, 4))(images())] == [64, 512]


def test_norm_gives_what_the_heads_of_timm_are_given():
    model = small(DINOV2, norm=True, prefix_tokens='cls')
    x = images(28, 42)
    ((features, cls),) = model(x)
    tokens = model.timm_model.forward_features(x)
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens[:, 1:])


def test_all_prefix_tokens():
    ((features, tokens),) = small('vit_small_patch14_reg4_dinov2', prefix_tokens='all')(images(28, 42))
    assert features.shape == (2, 32, 2, 3) and tokens.shape == (2, 5, 32)


@pytest.mark.parametrize(('height', 'width'), [(75, 90), (31, 64), (224, 160)])
@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'samvit_base_patch16', SWIN])
def test_sizes_that_are_no_multiple_are_padded(name, height, width):
    model = small(name)
    patch = model.timm_model.patch_embed.patch_size[0]
    x = images(height, width)
    padded = torch.nn.functional.pad(x, (0, -width % patch, 0, -height % patch))
    for a, b in zip(model(x), model(padded)):
        assert torch.equal(a, b)


def test_nothing_is_built_that_no_map_needs():
    model = small(DINOV2, out_indices=(1,)).train()
    assert len(model.timm_model.blocks) == 2
    sum(m.square().sum() for m in model(images(28, 28))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('library', ['mmpretrain', 'mmdet', 'mmseg'])
def test_registered_in_every_scope(library):
    init_default_scope(library)
    registry = import_module(f'{library}.registry').MODELS
    assert registry.get('TIMMFeatures') is TIMMFeatures
    model = registry.build(dict(type='ICoNTIMMFeatures', model_name=DINOV2, model_kwargs=SMALL))
    assert summarize(model).method == 'icon'


@pytest.mark.parametrize('name', [DINOV2, SWIN])
@pytest.mark.parametrize('method', ['icon', 'adaptformer', 'lora'])
def test_adapters_start_as_nothing_and_see_the_grid(name, method):
    model = small(name, out_indices=(0, 2))
    before = [model(images(28 * k, 56)) for k in (1, 2)]
    inject(model, method)
    model.init_weights()
    for k in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(model(images(28 * k, 56)), before[k - 1]))
    for n, p in model.named_parameters():
        if 'adapter' in n:
            torch.nn.init.normal_(p, std=0.1)
    assert not torch.equal(model(images(28, 56))[-1], before[0][-1])
    remove(model)
    assert torch.equal(model(images(28, 56))[-1], before[0][-1])


def test_recomputing_changes_no_gradient():
    grads = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = small(DINOV2, with_cp=with_cp).train()
        model(images(28, 28))[0].square().sum().backward()
        grads.append(model.timm_model.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*grads)


def saved(model, path):
    save_file({n: v.contiguous().clone() for n, v in model.state_dict().items()}, path)
    return str(path)


@pytest.mark.parametrize('adapted', [False, True])
def test_a_checkpoint_of_another_size_is_loaded_as_timm_loads_it(tmp_path, adapted):
    other = timm.create_model(DINOV2, img_size=70, num_classes=5, **SMALL).eval()
    path = saved(other, tmp_path / 'a.safetensors')
    options = dict(out_indices=(0, 1), norm=True, model_kwargs=dict(SMALL, img_size=56), checkpoint=path)
    model = small(DINOV2, **options)
    if adapted:
        inject(model)
    model.init_weights()
    theirs = timm.create_model(
        DINOV2,
        pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=other.state_dict(), num_classes=5, hf_hub_id=None, url=''),
        img_size=56,
        num_classes=5,
        **SMALL,
    ).eval()
    x = images(56, 56)
    expected = theirs.forward_intermediates(x, indices=[0, 1], norm=True, intermediates_only=True)
    for a, b in zip(model(x), expected):
        torch.testing.assert_close(a, b)


def test_pretrained_is_what_timm_has_for_the_name(monkeypatch):
    """Asked for by init_weights alone: tests and predictions need no download."""
    asked = []

    def create(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        model = timm_create(name, **kwargs)
        if pretrained:
            torch.nn.init.constant_(model.norm.bias, 7.0)
        return model

    timm_create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', create)
    model = small(DINOV2, pretrained=True, norm=True)
    assert not any(asked)
    model.init_weights()
    assert (model.timm_model.norm.bias == 7).all()


def test_init_cfg_is_the_same_as_checkpoint(tmp_path):
    other = timm.create_model(DINOV2, **SMALL)
    state = {f'backbone.{n}': v for n, v in other.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'a.pth'), prefix='backbone.')
    model = small(DINOV2, init_cfg=init_cfg)
    model.init_weights()
    assert torch.equal(model.timm_model.blocks[2].mlp.fc1.weight, other.blocks[2].mlp.fc1.weight)


def test_without_weights_init_weights_leaves_timms(tmp_path):
    model = small(DINOV2)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            dict(model_name='vit_smal_patch14_dinov2'),
            r"no model 'vit_smal_.*; the nearest names are .*vit_small_patch14_dinov2",
        ),
        (dict(out_indices=(0, 3)), r'out_indices \[3\] are out of range: .* has 3 maps, 0 to 2'),
        (dict(out_indices=(-4,)), r'out of range'),
        (dict(out_indices=()), 'names no map'),
        (dict(out_indices=(2, 0)), 'must ascend'),
        (dict(prefix_tokens='class'), "must be None, 'cls' or 'all'"),
        (dict(model_name='vit_base_patch16_siglip_224', prefix_tokens='all'), 'gives no tokens beside its maps'),
        (dict(pretrained='a.pth'), 'give a file as checkpoint='),
        (dict(pretrained=True, checkpoint='a.pth'), 'not both'),
        (dict(checkpoint='a.pth', init_cfg=dict(type='Pretrained', checkpoint='b.pth')), 'give the weights once'),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        small(**{'name': DINOV2, **{('name' if k == 'model_name' else k): v for k, v in options.items()}})


def test_a_model_without_intermediates(monkeypatch):
    monkeypatch.delattr(timm.models.ResNet, 'forward_intermediates')
    with pytest.raises(ValueError, match='resnet18 .ResNet. gives no intermediate maps'):
        TIMMFeatures('resnet18')


def test_a_fixed_size_is_named():
    model = TIMMFeatures('beit_base_patch16_224', model_kwargs=dict(SMALL, img_size=(32, 48))).eval()
    assert model(images(32, 48))[0].shape == (2, 32, 2, 3)
    with pytest.raises(ValueError, match=r'takes images of 32 x 48 pixels, got 64 x 96.*img_size=\(64, 96\)'):
        model(images())


def test_a_checkpoint_of_another_family_or_size(tmp_path):
    swin = saved(timm.create_model(SWIN, **STAGES), tmp_path / 'swin.safetensors')
    with pytest.raises(ValueError, match=r'does not fit vit_small_patch14_dinov2.*looks like a Swin'):
        small(DINOV2, checkpoint=swin).init_weights()
    deeper = saved(timm.create_model(DINOV2, **dict(SMALL, depth=5)), tmp_path / 'deeper.safetensors')
    with pytest.raises(ValueError, match=r'without a place here: blocks\.[34]'):
        small(DINOV2, checkpoint=deeper).init_weights()
    wider = saved(timm.create_model(DINOV2, **dict(SMALL, embed_dim=64)), tmp_path / 'wider.safetensors')
    with pytest.raises(ValueError, match=r'is \(1, 1, 64\) there, \(1, 1, 32\) here'):
        small(DINOV2, checkpoint=wider).init_weights()


def test_a_damaged_or_missing_file(tmp_path):
    path = tmp_path / 'a.safetensors'
    saved(timm.create_model(DINOV2, **SMALL), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DamagedFileError, match='not a valid safetensors file'):
        small(DINOV2, checkpoint=str(path)).init_weights()
    with pytest.raises(FileNotFoundError, match=r'nowhere\.pth does not exist'):
        small(DINOV2, checkpoint='nowhere.pth').init_weights()


def test_weights_are_accounted_for_in_a_training(tmp_path):
    """By a PEFTHook, which refuses frozen tensors that no file brought; a test needs the base file no more."""
    other = timm.create_model(DINOV2, img_size=28, **SMALL)
    path = tmp_path / 'base.safetensors'
    saved(other, path)
    backbone = dict(type='TIMMFeatures', model_name=DINOV2, norm=True, checkpoint=str(path), model_kwargs=SMALL)
    changes = {
        'model.backbone': dict(backbone, in_channels=1, model_kwargs=dict(SMALL, img_size=28), _delete_=True),
        'model.neck': dict(type='GlobalAveragePooling'),
    }
    with pytest.raises(ValueError, match=r'is \(32, 3, 14, 14\) there, \(32, 1, 14, 14\) here'):
        build(tmp_path, **changes).train()  # three channels there, one here
    saved(timm.create_model(DINOV2, img_size=28, in_chans=1, **SMALL), path)
    runner = build(tmp_path, **changes)
    runner.train()
    assert get_injection(runner.model).accounts['backbone'].missing == []
    state = load_file(path)
    trained = runner.model.backbone.timm_model
    assert torch.equal(trained.blocks[1].mlp.fc1.weight, state['blocks.1.mlp.fc1.weight'])
    path.unlink()
    runner = build(tmp_path, **changes, load_from=str(tmp_path / 'epoch_2.pth'))
    assert 'accuracy/top1' in runner.test()


def test_a_download_is_not_unpickled(tmp_path, monkeypatch):
    """Also in a program that has not guarded MMEngine's own reader."""
    mark = tmp_path / 'executed'

    class Hostile:
        def __reduce__(self):
            return Path.touch, (mark,)

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', lambda url, path: torch.save(dict(x=Hostile()), path))
    model = TIMMFeatures('vit_tiny_patch16_224', checkpoint='https://host.invalid/weights.pth')
    with pytest.raises(UntrustedFileError, match='weights.pth holds more than tensors and plain data'):
        model.init_weights()
    assert not mark.exists()
