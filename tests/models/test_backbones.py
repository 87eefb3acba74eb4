from importlib import import_module

import pytest
import torch
from families import SWIN, VIT, flatten, image
from mmengine.registry import init_default_scope
from mmpretrain.models.backbones import SwinTransformer, SwinTransformerV2, TIMMBackbone, VisionTransformer
from mmpretrain.registry import MODELS

import iconformer_mm  # noqa: F401
from iconformer_mm import remove, summarize
from iconformer_mm.registry import PEFT_METHODS

CASES = [
    (VisionTransformer, dict(arch=VIT, img_size=64)),
    (SwinTransformer, dict(arch=SWIN, img_size=64, pad_small_map=True)),
    (
        SwinTransformerV2,
        dict(arch={**SWIN, 'extra_norm_every_n_blocks': 0}, img_size=64, window_size=[4, 4, 2, 2], pad_small_map=True),
    ),
    (TIMMBackbone, dict(model_name='vit_tiny_patch16_224', img_size=64, embed_dim=32, depth=2, num_heads=2)),
]


@pytest.mark.parametrize(('parent', 'arguments'), CASES, ids=lambda case: getattr(case, '__name__', ''))
def test_registered_backbones(parent, arguments):
    model = MODELS.build(dict(type=f'ICoN{parent.__name__}', **arguments, peft=dict(bottleneck=8)))
    assert isinstance(model, parent) and isinstance(model, MODELS.get(f'ICoN{parent.__name__}'))
    assert summarize(model).method == 'icon'
    assert next(p for n, p in model.named_parameters() if 'adapter_attention.down.weight' in n).shape[0] == 8

    original = parent(**arguments)
    original.load_state_dict({n: v for n, v in model.state_dict().items() if 'adapter' not in n}, strict=False)
    for m in (model, original):
        torch.manual_seed(0)
        m.init_weights()
        m.requires_grad_(False)
        m.eval()
    x = image((64, 64))
    for a, b in zip(flatten(model(x)), flatten(original(x))):
        assert torch.equal(a, b)
    remove(model)
    assert summarize(model).method is None


@pytest.mark.parametrize('method', sorted(PEFT_METHODS.module_dict))
@pytest.mark.parametrize(('parent', 'arguments'), CASES[:2], ids=lambda case: getattr(case, '__name__', ''))
def test_every_method_by_peft(method, parent, arguments):
    """``peft=dict(type=...)``; the host's own initialisation does not undo where the method starts."""
    config = dict(type=f'ICoN{parent.__name__}', **arguments, peft=dict(type=method))
    if method == 'vpt' and parent is SwinTransformer:
        with pytest.raises(ValueError, match='take no prompt tokens'):
            MODELS.build(config)
        return
    model, original = MODELS.build(config), parent(**arguments)
    original.load_state_dict({n: v for n, v in model.state_dict().items() if 'adapter' not in n}, strict=False)
    for m in (model, original):
        torch.manual_seed(0)
        m.init_weights()
        m.eval()
    assert summarize(model).method == method
    with torch.no_grad():
        equal = all(
            torch.equal(a, b) for a, b in zip(flatten(model(image((64, 64)))), flatten(original(image((64, 64)))))
        )
    assert equal != (method in ('ssf', 'mona', 'vpt'))


def test_other_methods_and_defaults():
    default = MODELS.build(dict(type='ICoNVisionTransformer', arch=VIT, img_size=64))
    assert default.layers[0].adapter_attention.bottleneck == 64
    other = MODELS.build(dict(type='ICoNVisionTransformer', arch=VIT, img_size=64, peft=dict(type='adaptformer')))
    assert summarize(other).method == 'adaptformer'
    with pytest.raises(ValueError, match="unknown option 'bottelneck'"):
        MODELS.build(dict(type='ICoNVisionTransformer', arch=VIT, img_size=64, peft=dict(bottelneck=1)))


def test_old_checkpoints_are_renamed_as_for_the_parent():
    """mmpretrain renames `norm` to `norm3`, and drops masks, only for its very own class."""
    arguments = dict(arch=SWIN, img_size=64, pad_small_map=True)
    model = MODELS.build(dict(type='ICoNSwinTransformer', **arguments))
    state = SwinTransformer(**arguments).state_dict()
    old = {n.replace('norm3.', 'norm.') if n.startswith('norm3.') else n: v + 1 for n, v in state.items()}
    old['stages.0.blocks.0.attn.attn_mask'] = torch.zeros(1)
    result = model.load_state_dict(old, strict=False)
    assert not result.unexpected_keys
    assert all('adapter' in name for name in result.missing_keys)
    assert torch.equal(model.norm3.weight, state['norm3.weight'] + 1)
    assert type(model).__name__ == 'ICoNSwinTransformer'


@pytest.mark.parametrize(
    ('library', 'name', 'arguments'),
    [
        ('mmdet', 'SwinTransformer', dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])),
        ('mmseg', 'SwinTransformer', dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8])),
        ('mmseg', 'VisionTransformer', dict(img_size=64, embed_dims=32, num_layers=2, num_heads=2, mlp_ratio=2)),
        ('mmseg', 'TIMMBackbone', dict(CASES[3][1], features_only=False, pretrained=False)),
    ],
)
def test_each_scope_has_its_own_class(library, name, arguments):
    init_default_scope(library)
    registry = import_module(f'{library}.registry').MODELS
    parent = registry.get(name)
    model = registry.build(dict(type=f'ICoN{name}', **arguments))
    assert isinstance(model, parent) and parent.__module__.startswith(library)
    assert type(model) is registry.get(f'ICoN{name}')
    assert summarize(model).method == 'icon'
