"""The budget: with bottleneck 64 and 3 x 3 kernels, 1.6 % to 2.8 % of the backbone."""

import mmpretrain.models.backbones as backbones
import pytest
import torch
from families import image

from iconformer_mm import inject, remove, summarize


@pytest.mark.parametrize(
    ('cls', 'arch', 'backbone', 'adapters', 'without_norm', 'share'),
    [
        ('SwinTransformer', 'large', 194_995_476, 3_242_112, 3_228_288, 1.663),
        ('VisionTransformer', 'base', 85_798_656, 1_645_824, 1_638_912, 1.918),
        ('SwinTransformer', 'base', 86_743_224, 2_466_048, 2_452_224, 2.843),
        ('SwinTransformerV2', 'base', 86_893_816, 2_466_048, 2_452_224, 2.838),
    ],
)
def test_budget(cls, arch, backbone, adapters, without_norm, share):
    model = getattr(backbones, cls)(arch=arch)
    summary = inject(model, 'icon')
    assert (summary.backbone, summary.adapters, summary.trainable) == (backbone, adapters, adapters)
    assert round(100 * summary.backbone_share, 3) == share
    remove(model)
    assert inject(model, 'icon', kernel_norm=None).adapters == without_norm


def test_adaptformer_budget():
    """The published count of AdaptFormer-64 on ViT-B/16."""
    assert inject(backbones.VisionTransformer(arch='base'), 'adaptformer').adapters == 1_189_632


def test_swin_base_itself_stays_exact():
    """Before training, after ``init_weights()`` and after ``remove``, to the last bit."""
    model, original = (backbones.SwinTransformer(arch='base') for _ in range(2))
    for m in (model, original):
        m.requires_grad_(False)
        m.eval()
    x = image((224, 224), batch=1)

    def equal():
        return torch.equal(model(x)[0], original(x)[0])

    original.load_state_dict(model.state_dict())
    assert inject(model).num_sites == 24
    assert equal()
    for m in (model, original):
        torch.manual_seed(1)
        m.init_weights()
    assert equal()
    remove(model)
    assert equal() and summarize(model).adapters == 0
