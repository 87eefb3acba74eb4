import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample


@pytest.fixture(autouse=True)
def _mmseg_scope():
    init_default_scope('mmseg')


def build(**options):
    return MODELS.build(dict(type='DepthDeconvHead', in_channels=16, **options))


def sample(depth):
    data_sample = SegDataSample()
    data_sample.gt_depth_map = PixelData(data=depth)
    return data_sample


def silog(predicted, target):
    """Eigen et al., 2014, over the known pixels of each image."""
    values = []
    for p, t in zip(predicted, target):
        known = t > 0
        d = torch.log(t[known]) - torch.log(p[known])
        values.append(torch.sqrt((d**2).mean() - 0.5 * d.mean() ** 2))
    return torch.stack(values).mean()


def test_shape_and_bounds():
    head = build(max_depth=4.0).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=3.0)
    depth = head([torch.randn(2, 4, 3, 4), 10 * torch.randn(2, 16, 3, 4)])
    assert depth.shape == (2, 1, 24, 32)
    assert depth.min() >= 0 and depth.max() <= 4 and depth.min() < 1 and depth.max() > 3


def test_starts_in_the_middle():
    head = build()
    head.init_weights()
    torch.testing.assert_close(head.eval()([torch.randn(1, 16, 2, 2)]).mean().item(), 5.0, atol=0.05, rtol=0)


def test_number_of_deconvolutions():
    head = build(num_filters=(8, 4)).eval()
    assert head([torch.randn(1, 16, 3, 4)]).shape == (1, 1, 12, 16)


def test_loss_is_silog_over_known_pixels():
    head = build()
    target = torch.rand(2, 1, 48, 64) * 8 + 0.5
    target[:, :, :10] = 0  # unknown
    predicted = torch.rand(2, 1, 48, 64) * 8 + 0.5
    loss = head.loss_by_feat(predicted, [sample(t) for t in target])['loss_silog']
    torch.testing.assert_close(loss, silog(predicted, target))


def test_images_without_any_depth_give_no_nan():
    head = build()
    target = torch.rand(2, 1, 48, 64) + 0.5
    target[1] = 0
    features = torch.randn(2, 16, 6, 8, requires_grad=True)
    head.loss_by_feat(head([features]), [sample(t) for t in target])['loss_silog'].backward()
    assert torch.isfinite(features.grad).all() and features.grad[0].abs().sum() > 0
    loss = head.loss_by_feat(head([features]), [sample(torch.zeros(1, 48, 64))] * 2)['loss_silog']
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(max_depth=0), 'max_depth must be positive'),
        (dict(num_filters=()), 'num_filters must hold one or more positive integers'),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
