"""Weights that do not fit the frozen blocks are refused, however they are loaded."""

import pytest
import torch
from families import SWIN, VIT
from mmengine.runner.checkpoint import load_checkpoint
from mmpretrain.models.backbones import SwinTransformer, VisionTransformer

from iconformer_mm import inject


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
