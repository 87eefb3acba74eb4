from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import init_default_scope

from iconformer_mm.models.mmpretrain_necks import TokenPooling
from iconformer_mm.models.vit_pyramid import SimpleFPN, ViTPyramid


def layer_norm(x, norm):
    """Over channels, by hand."""
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-6).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]


def test_simple_fpn_is_vitdets():
    """The level of stride 4, step by step: two deconvolutions, 1 x 1, 3 x 3, a layer norm after each but the second."""
    torch.manual_seed(0)
    neck, x = SimpleFPN(32, 16), torch.randn(2, 32, 5, 7)
    for p in neck.parameters():
        torch.nn.init.normal_(p, std=0.3)
    (first, norm, _, second), project, norm1, smooth, norm2 = neck.levels[0]
    y = F.gelu(layer_norm(F.conv_transpose2d(x, first.weight, first.bias, stride=2), norm))
    y = F.conv_transpose2d(y, second.weight, second.bias, stride=2)
    y = layer_norm(F.conv2d(y, project.weight), norm1)
    y = layer_norm(F.conv2d(y, smooth.weight, padding=1), norm2)
    levels = neck([torch.zeros(2, 32, 5, 7), x])
    torch.testing.assert_close(levels[0], y)
    assert [tuple(level.shape) for level in levels] == [
        (2, 16, 20, 28),
        (2, 16, 10, 14),
        (2, 16, 5, 7),
        (2, 16, 2, 3),
        (2, 16, 1, 2),
    ]
    assert torch.equal(levels[4], levels[3][:, :, ::2, ::2])


@pytest.mark.parametrize('number', [1, 4])
def test_vit_pyramid_has_swins_channels_and_strides(number):
    neck = ViTPyramid(32, (8, 16, 32, 64))
    maps = [torch.randn(2, 32, 4, 6) for _ in range(number)]
    levels = neck(maps)
    assert [tuple(level.shape[1:]) for level in levels] == [(8, 16, 24), (16, 8, 12), (32, 4, 6), (64, 2, 3)]
    sum(level.square().sum() for level in levels).backward()
    assert all(p.grad is not None for p in neck.parameters())
    # Tokens beside a map are left; each level is made of its own map.
    assert torch.equal(neck([[m, None] for m in maps])[1], levels[1])
    if number == 4:
        changed = neck([maps[0] + 1, *maps[1:]])
        assert not torch.equal(changed[0], levels[0]) and torch.equal(changed[1], levels[1])


@pytest.mark.parametrize('library', ['mmdet', 'mmseg'])
def test_scopes_and_norms(library):
    init_default_scope(library)
    build = import_module(f'{library}.registry').MODELS.build
    neck = build(
        dict(type='SimpleFPN', in_channels=16, out_channels=8, num_outs=4, norm_cfg=dict(type='GN', num_groups=4))
    )
    assert len(neck([torch.randn(1, 16, 4, 4)])) == 4
    build(dict(type='ViTPyramid', in_channels=16, out_channels=(8,), scales=(1,)))


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: SimpleFPN(16, num_outs=3), 'num_outs must be at least 4'),
        (lambda: ViTPyramid(16, (8, 8)), r'4 scales need as many out_channels, got \(8, 8\)'),
        (lambda: ViTPyramid(16, (8,), (3,)), 'scales must be some of'),
        (lambda: ViTPyramid(18), 'multiple of 4'),
        (lambda: ViTPyramid(16)([torch.zeros(1, 16, 2, 2)] * 3), 'one for each of its 4 levels, got 3'),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_token_pooling():
    features, cls, tokens = torch.randn(2, 8, 3, 4), torch.randn(2, 8), torch.randn(2, 5, 8)
    mean = features.flatten(2).mean(2)
    torch.testing.assert_close(TokenPooling()([features])[0], mean)
    torch.testing.assert_close(TokenPooling()([[features, cls]] * 2)[0], torch.cat([cls, mean] * 2, 1))
    torch.testing.assert_close(TokenPooling()([[features, tokens]])[0], torch.cat([tokens.flatten(1), mean], 1))


@pytest.mark.parametrize('norm_cfg', [None, dict(type='BN')])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_rois_of_a_pyramid_are_read_in_order(norm_cfg, memory_format):
    """mmcv's RoIAlign takes any map for contiguous. torchvision's reads the same values by their strides."""
    ops = pytest.importorskip('mmcv.ops')
    x = torch.randn(1, 32, 6, 8).to(memory_format=memory_format)
    rois = torch.tensor([[0, 3.0, 5.0, 40.0, 50.0]])
    for level in SimpleFPN(32, 16, norm_cfg=norm_cfg)([x]):
        ours, theirs = (ops.RoIAlign(4, 0.1, 2, use_torchvision=other)(level, rois) for other in (False, True))
        torch.testing.assert_close(ours, theirs)
