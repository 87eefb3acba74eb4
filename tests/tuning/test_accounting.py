"""After weights are loaded, every tensor is loaded, or new and trained, or an error, however they are loaded."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, SWIN, VIT, flatten, image, stir
from mmengine.config import ConfigDict
from mmengine.runner.checkpoint import load_checkpoint, load_state_dict
from mmpretrain.models.backbones import ResNet, SwinTransformer, VisionTransformer

from iconformer_mm import inject, load_adapter, remove, save_adapter
from iconformer_mm.checkpoint import read_adapter
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.accounting import (
    DERIVED,
    LoadRecord,
    WeightsError,
    output_norms,
    require_all,
)
from iconformer_mm.tuning.freezing import is_adapter


@pytest.fixture(params=['icon', 'frozen'])
def model(request):
    model = VisionTransformer(arch=VIT, img_size=64)
    inject(model, request.param)
    return model


@pytest.fixture
def weights():
    torch.manual_seed(1)
    return VisionTransformer(arch=VIT, img_size=64).state_dict()


def load(model, state, tmp_path, **init_cfg):
    """As a config does: by ``init_cfg``."""
    path = tmp_path / 'weights.pth'
    torch.save(dict(state_dict=state), path)
    model.init_cfg = dict(type='Pretrained', checkpoint=str(path), **init_cfg)
    model._is_init = False
    model.init_weights()


def test_fitting_weights_load(model, weights, tmp_path):
    load(model, weights, tmp_path)
    assert torch.equal(model.layers[0].attn.qkv.weight, weights['layers.0.attn.qkv.weight'])


def test_prefixed_weights_load(model, weights, tmp_path):
    load(model, {f'backbone.{n}': v for n, v in weights.items()}, tmp_path, prefix='backbone.')
    assert torch.equal(model.layers[0].attn.qkv.weight, weights['layers.0.attn.qkv.weight'])


def test_a_forgotten_prefix(model, weights, tmp_path):
    with pytest.raises(RuntimeError, match=r'30 of 30 frozen tensors are missing.*backbone.cls_token.*`prefix`'):
        load(model, {f'backbone.{n}': v for n, v in weights.items()}, tmp_path)


def test_weights_under_other_names(model, weights, tmp_path):
    """Split projections for a fused one: logged by mmengine, fatal here."""
    state = {n: v for n, v in weights.items() if 'qkv' not in n}
    state.update({f'layers.{i}.attn.{p}_proj.weight': torch.zeros(32, 32) for i in range(2) for p in 'qkv'})
    with pytest.raises(RuntimeError, match=r'4 of 30 frozen tensors are missing, among them layers.0.attn.qkv.'):
        load(model, state, tmp_path)


def test_weights_of_another_size(model, tmp_path):
    other = VisionTransformer(arch={**VIT, 'feedforward_channels': 128}, img_size=64)
    with pytest.raises(RuntimeError, match='6 frozen tensors have another shape, among them: size mismatch for lay'):
        load(model, other.state_dict(), tmp_path)


def test_weights_of_a_whole_other_model(model, tmp_path):
    path = tmp_path / 'swin.pth'
    torch.save(SwinTransformer(arch=SWIN, img_size=64).state_dict(), path)
    with pytest.raises(RuntimeError, match='wrong pre-trained weights for VisionTransformer'):
        load_checkpoint(model, str(path))


def test_new_norms_around_the_blocks_may_be_missing(model, weights):
    del weights['ln1.weight'], weights['ln1.bias']
    assert 'ln1.weight' in model.load_state_dict(weights, strict=False).missing_keys


def test_adapters_alone_may_be_loaded(weights):
    model = VisionTransformer(arch=VIT, img_size=64)
    inject(model)
    state = {n: torch.ones_like(v) for n, v in model.state_dict().items() if 'adapter' in n}
    model.load_state_dict(state, strict=False)
    assert model.layers[0].adapter_attention.up.weight.eq(1).all()


def test_other_position_embeddings_are_still_resized(model, weights, tmp_path):
    bigger = VisionTransformer(arch=VIT, img_size=96).state_dict()
    load(model, bigger, tmp_path)


def without(state, *names):
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize('family', FAMILIES, ids=str)
def test_each_tensor_of_each_family_is_loaded_or_trained_or_an_error(family):
    torch.manual_seed(0)
    backbone = family.build()
    weights = {name: value.clone() for name, value in backbone.state_dict().items()}
    inject(backbone, 'icon' if 'SwinV2' not in family.name else 'bitfit')
    for name in weights:
        frozen = not dict(backbone.named_parameters()).get(name, torch.zeros(1)).requires_grad
        if name.rpartition('.')[2] in DERIVED:
            load_state_dict(backbone, without(weights, name), logger='silent')
        elif name in output_norms(backbone):
            load_state_dict(backbone, without(weights, name), logger='silent')
            assert backbone.get_parameter(name).requires_grad and frozen
        else:
            with pytest.raises(WeightsError, match=f'1 of .* frozen tensors are missing, among them {name}'):
                load_state_dict(backbone, without(weights, name), logger='silent')
    load_state_dict(backbone, weights, logger='silent')
    assert not any(backbone.get_parameter(name).requires_grad for name in output_norms(backbone))


def test_output_norms_are_known():
    """Those of dense hosts and behind another pooling, and no norm of a stem, a block or between stages."""
    found = {family.name: {n.rpartition('.')[0] for n in output_norms(family.build())} for family in FAMILIES}
    assert found['mmdet Swin'] == found['mmseg Swin'] == {'norm0', 'norm1', 'norm2', 'norm3'}
    assert found['Swin'] == {'norm3'} and found['ViT'] == {'ln1'}
    assert found['timm ViT'] == {'timm_model.norm'}
    assert found['mmseg MiT'] == set()  # its norms behind the stages are in the weights of classifiers


def test_the_stem_of_other_images_can_be_trained_and_the_error_says_how(weights):
    model = VisionTransformer(arch=VIT, img_size=64, in_channels=1)
    inject(model)
    with pytest.raises(WeightsError, match=r"another shape.*patch_embed.*with unfreeze=\['patch_embed\.\*'\]"):
        load_state_dict(model, weights, logger='silent')


@pytest.mark.parametrize('missing', ['conv1.weight', 'bn1.running_mean', 'layer1.0.bn1.running_var'])
def test_a_backbone_without_blocks_is_accounted_for_with_its_buffers(missing):
    torch.manual_seed(0)
    model = ResNet(18)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    inject(model, 'bitfit')
    load_state_dict(model, without(weights, 'bn1.num_batches_tracked'), logger='silent')
    with pytest.raises(WeightsError, match=f'1 of 100 frozen tensors are missing, among them {missing}'):
        load_state_dict(model, without(weights, missing), logger='silent')


def test_a_file_with_nothing_of_the_backbone(model):
    with pytest.raises(WeightsError, match='30 of 30 frozen tensors are missing'):
        model.load_state_dict({}, strict=False)


@pytest.mark.parametrize('method', ['lora', dict(type='icon', bottleneck=4), 'vpt'])
def test_adapters_of_another_method(method, weights):
    other = VisionTransformer(arch=VIT, img_size=64)
    inject(other, method)
    model = VisionTransformer(arch=VIT, img_size=64)
    inject(model)
    with pytest.raises(WeightsError, match=r"adapters of another method or with other options.*'type': 'icon'"):
        load_state_dict(model, other.state_dict(), logger='silent')


@pytest.mark.parametrize(
    ('name', 'options', 'key'),
    [
        ('vit_tiny_patch16_224', dict(embed_dim=32, depth=2, num_heads=2), 'pos_embed'),
        ('vit_small_patch14_reg4_dinov2', dict(embed_dim=32, depth=2, num_heads=2), 'pos_embed'),
    ],
)
def test_position_embeddings_of_timm_are_resized_as_timm_does(name, options, key):
    import timm
    from mmpretrain.models.backbones import TIMMBackbone
    from timm.models.vision_transformer import checkpoint_filter_fn

    torch.manual_seed(0)
    small = TIMMBackbone(name, img_size=56 if 'patch14' in name else 64, **options)
    weights = {n: torch.randn_like(v) for n, v in small.state_dict().items()}
    size = 112 if 'patch14' in name else 128
    large = TIMMBackbone(name, img_size=size, **options)
    inject(large)
    load_state_dict(large, weights, logger='silent')
    plain = timm.create_model(name, img_size=size, num_classes=0, **options)
    own = {n.removeprefix('timm_model.'): v for n, v in weights.items()}
    expected = checkpoint_filter_fn(own, plain)[key]
    assert expected.shape != own[key].shape
    assert torch.equal(getattr(large.timm_model, key), expected)


def test_window_tables_of_timm_are_resized_as_timm_does():
    from mmpretrain.models.backbones import TIMMBackbone
    from timm.layers import resize_rel_pos_bias_table

    torch.manual_seed(0)
    options = dict(img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 2))
    small = TIMMBackbone('swin_tiny_patch4_window7_224', window_size=2, **options)
    weights = {n: torch.randn_like(v) for n, v in small.state_dict().items()}
    large = TIMMBackbone('swin_tiny_patch4_window7_224', window_size=4, **options)
    inject(large)
    load_state_dict(large, weights, logger='silent')
    name = 'timm_model.layers.0.blocks.0.attn.relative_position_bias_table'
    expected = resize_rel_pos_bias_table(weights[name], (4, 4), (49, 1))
    assert torch.equal(large.get_parameter(name), expected)


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_detectors_train_the_output_norms_that_a_classifier_lacks(library, tmp_path):
    """As the stock configs load ImageNet weights; and the file has what was trained."""
    family = next(f for f in FAMILIES if f.name == f'{library} Swin')
    torch.manual_seed(0)
    weights = {n: torch.rand_like(v) if v.is_floating_point() else v for n, v in family.build().state_dict().items()}
    norms = sorted(output_norms(family.build()))
    path = tmp_path / 'imagenet.pth'
    torch.save(dict(state_dict={f'backbone.{n}': v for n, v in without(weights, *norms).items()}), path)

    def make():
        backbone = family.build()
        inject(backbone)
        backbone.init_cfg = ConfigDict(type='Pretrained', checkpoint=str(path))
        backbone.init_weights()
        return backbone.eval()

    source = make()
    trained = [n for n, p in source.named_parameters() if p.requires_grad and not is_adapter(n)]
    assert sorted(trained) == norms and len(norms) == 8
    source.train()
    assert sorted(n for n, p in source.named_parameters() if p.requires_grad and not is_adapter(n)) == norms
    with torch.no_grad():
        for name in norms:
            source.get_parameter(name).add_(0.5)
    stir(source).eval()
    save_adapter(source, tmp_path / 'a.safetensors')
    content, tensors = read_adapter(tmp_path / 'a.safetensors')
    assert {f'backbone.{n}' for n in norms} <= tensors.keys() and not set(norms) & set(content['base_parameters'])
    target = make()
    load_adapter(target, tmp_path / 'a.safetensors')
    for a, b in zip(flatten(target(image((64, 64)))), flatten(source(image((64, 64))))):
        assert torch.equal(a, b)
    remove(target)
    assert all(
        torch.equal(target.get_parameter(n), torch.full_like(v, float('weight' in n)))
        for n, v in ((n, weights[n]) for n in norms)
    )
    merged = make()
    assert set(get_injection(merged).trained_norms()) == set(norms)


def test_an_older_file_keeps_output_norms_frozen(tmp_path):
    """Where the base of the file has them, they are base again."""
    family = next(f for f in FAMILIES if f.name == 'mmdet Swin')
    torch.manual_seed(0)
    base = family.build()
    weights = {n: v.clone() for n, v in base.state_dict().items()}
    inject(base)
    save_adapter(stir(base).eval(), tmp_path / 'a.safetensors')
    target = family.build()
    inject(target)
    load_state_dict(target, without(weights, *output_norms(target)), logger='silent')
    assert get_injection(target).trained_norms()
    load_adapter(target.eval(), tmp_path / 'a.safetensors')
    assert not get_injection(target).trained_norms()
    for a, b in zip(flatten(target(image((64, 64)))), flatten(base(image((64, 64))))):
        assert torch.equal(a, b)


def test_copies_have_accounts_of_their_own(weights):
    model = VisionTransformer(arch=VIT, img_size=64)
    inject(model)
    twin = copy.deepcopy(model)
    load_state_dict(twin, without(weights, 'ln1.weight', 'ln1.bias'), logger='silent')
    assert twin.ln1.weight.requires_grad and not model.ln1.weight.requires_grad


def test_a_record_knows_what_was_loaded_wherever_loads_began(weights):
    model = VisionTransformer(arch=VIT, img_size=64)
    record = LoadRecord(model)
    assert not record.begun and len(record.missing()) == 30
    model.layers[0].load_state_dict({n[9:]: v for n, v in weights.items() if n.startswith('layers.0.')})
    assert set(record.missing()) == {n for n in weights if not n.startswith('layers.0.')}
    load_state_dict(model, without(weights, 'pos_embed'), logger='silent')
    assert list(record.missing()) == ['pos_embed']
    small = dict(pos_embed=torch.zeros(1, 3, 32))
    model._load_state_dict_pre_hooks.popitem(last=False)  # the host's resizing, which cannot act on this
    load_state_dict(model, small, logger='silent')
    assert record.missing() == dict(pos_embed='pos_embed ((1, 3, 32) in the file, (1, 17, 32) in the model)')
    with pytest.raises(WeightsError, match=r'w.pth lacks 1 of the 30 tensors of the model, such as pos_embed \(\(1, 3'):
        require_all(record, 'w.pth')
    record.note(['pos_embed'])
    require_all(record, 'w.pth')
    before = len(pickle.dumps(model.layers[0]))
    record.close()
    assert before < 2 * len(pickle.dumps(model.layers[0]))
