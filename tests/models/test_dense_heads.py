"""DPT's depth head and DINOv2's linear head."""

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

import iconformer_mm  # noqa: F401 (registers its parts)

WIDTHS = (8, 16, 24, 32)


@pytest.fixture(autouse=True)
def _mmseg_scope():
    init_default_scope('mmseg')


def dpt(**options):
    head = dict(type='DPTDepthHead', embed_dims=16, channels=8, post_process_channels=list(WIDTHS))
    return MODELS.build({**head, **options})


def maps(number=4, channels=16, size=(4, 6)):
    return [torch.randn(2, channels, *size) for _ in range(number)]


def linear(**options):
    return MODELS.build(dict(type='LinearBNHead', num_classes=5, **options))


def test_dpt_depth_is_bounded_and_starts_from_maps_or_pairs():
    head, inputs = dpt(max_depth=4.0).eval(), maps()
    depth = head(inputs)
    assert depth.shape == (2, 1, 32, 48) and depth.min() >= 0 and depth.max() <= 4
    pairs = [[m, torch.randn(2, 16)] for m in inputs]
    assert torch.equal(head(pairs), depth)  # the class token is ignored


@pytest.mark.parametrize('readout', ['add', 'project'])
def test_dpt_reads_the_class_token(readout):
    head, inputs = dpt(readout_type=readout).eval(), maps()
    depths = [head([[m, torch.full((2, 16), value)] for m in inputs]) for value in (0.0, 1.0)]
    assert not torch.equal(*depths)
    with pytest.raises(ValueError, match=f"readout_type='{readout}' needs the class token"):
        head(inputs)


def test_dpt_learns_depth():
    torch.manual_seed(0)
    head, inputs = dpt(), maps()
    samples = []
    for value in (2.0, 6.0):
        sample = SegDataSample()
        sample.gt_depth_map = PixelData(data=torch.full((1, 48, 64), value))
        samples.append(sample)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = head.loss_by_feat(head(inputs), samples)['loss_silog']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_linear_head_is_a_norm_and_one_matrix():
    head = linear(in_channels=[16, 16], in_index=[1, 3], norm_cfg=dict(type='BN')).eval()
    torch.nn.init.normal_(head.norm.running_mean)
    torch.nn.init.uniform_(head.norm.running_var, 0.5, 2)
    inputs = maps()
    x = torch.cat([inputs[1], inputs[3]], 1)
    x = (x - head.norm.running_mean[:, None, None]) / (head.norm.running_var[:, None, None] + head.norm.eps).sqrt()
    expected = torch.einsum('kc,bchw->bkhw', head.conv_seg.weight[:, :, 0, 0], x) + head.conv_seg.bias[:, None, None]
    torch.testing.assert_close(head(inputs), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(head([[m, torch.zeros(2, 16)] for m in inputs]), head(inputs))
    assert sum(p.numel() for p in head.parameters()) == 5 * 32 + 5 + 2 * 32


def test_linear_head_brings_maps_to_one_size():
    head = linear(in_channels=[16, 16], in_index=[0, 1], norm_cfg=dict(type='BN'))
    assert head([*maps(1), *maps(1, size=(2, 3))]).shape == (2, 5, 4, 6)
    assert linear(in_channels=16, norm_cfg=dict(type='BN'))(maps()).shape == (2, 5, 4, 6)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: dpt(max_depth=-1), 'max_depth must be positive'),
        (lambda: linear(in_channels=[16, 16], in_index=0), 'got 2 widths and 1 indices'),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()
