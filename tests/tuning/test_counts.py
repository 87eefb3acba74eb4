"""The budget: with bottleneck 64 and 3 x 3 kernels, 1.6 % to 2.8 % of the backbone."""

import re

import mmpretrain.models.backbones as backbones
import pytest
import torch
from conftest import ROOT
from families import image

from iconformer_mm import inject, remove, summarize
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.attachments import WeightMergingAttachment

# With all tokens read; where the class token alone is, the last block's filter is not trained.
RAW = {'VisionTransformer': dict(out_type='raw')}


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
    model = getattr(backbones, cls)(arch=arch, **RAW.get(cls, {}))
    summary = inject(model, 'icon')
    assert (summary.backbone, summary.adapters, summary.trainable) == (backbone, adapters, adapters)
    assert round(100 * summary.backbone_share, 3) == share
    remove(model)
    assert inject(model, 'icon', kernel_norm=None).adapters == without_norm


def test_a_filter_that_nobody_reads_is_not_trained():
    """In a ViT-B that returns its class token, 38,016 parameters of the last block would get no gradient."""
    summary = inject(backbones.VisionTransformer(arch='base', out_type='cls_token'), 'icon')
    assert (summary.adapters, summary.trainable) == (1_645_824, 1_645_824 - 38_016)


# Parameters that a method adds to a block of width d (FFN 4 d), with the defaults of its paper.
A_BLOCK = {
    'icon': lambda d: (64 * d + 64) + 64 * 64 * 9 + 2 * 64 * 9 + (64 * d + d),
    'icon-static': lambda d: (64 * d + 64) + 3 * 64 * 9 + (64 * d + d),
    'adaptformer': lambda d: (64 * d + 64) + (64 * d + d),
    'adapter': lambda d: 2 * ((64 * d + 64) + (64 * d + d)),
    'convpass': lambda d: 2 * ((8 * d + 8) + (8 * 8 * 9 + 8) + (8 * d + d)),
    'lorand': lambda d: 2 * (2 * (2 * 8 * d + 2 * 8 * d // 2 + 8 * 8) + d // 2 + d),
    'mona': lambda d: 2 * (4 * d + (64 * d + 64) + 64 * (9 + 25 + 49 + 3) + (64 * 64 + 64) + (64 * d + d)),
    'lora': lambda d: 2 * 8 * (d + d),
    'dora': lambda d: 3 * (16 * (d + d) + d) + (16 * (d + 4 * d) + 4 * d) + (16 * (4 * d + d) + d),
    'bitfit': lambda d: d + 3 * d + d + d + 4 * d + d,
    'norm': lambda d: 2 * 2 * d,
    'ssf': lambda d: 2 * (d + 3 * d + d + d + 4 * d + d),
    'vpt': lambda d: 10 * d,
}
# What they add outside of the blocks: to patch embedding, down-sampling (norm of 4 d, reduction
# to 2 d without a bias) and final norm.
VIT_REST = {'bitfit': 768 + 768, 'norm': 2 * 768, 'ssf': 2 * (768 + 768)}
DOWN = (128, 256, 512)
SWIN_REST = {
    'bitfit': 128 + 128 + sum(4 * d for d in DOWN) + 1024,
    'norm': 2 * (128 + sum(4 * d for d in DOWN) + 1024),
    'ssf': 2 * (128 + 128 + sum(4 * d for d in DOWN) + 1024) + sum(2 * d for d in DOWN),
}
# Published for ViT-B/16, heads not counted: AdaptFormer-64 (its code), LoRA of rank 8 on q and v and
# Convpass (0.29 M and 0.33 M), SSF (0.28 M with a head of 76,900), BitFit (0.10 M), norms (0.04 M), VPT's Partial-1.
PUBLISHED = {
    'adaptformer': 1_189_632,
    'lora': 294_912,
    'convpass': 327_552,
    'ssf': 282_724 - 76_900,
    'bitfit': 102_912,
    'norm': 38_400,
    'partial': 7_087_872,
}
SWIN_DEPTHS = {128: 2, 256: 2, 512: 18, 1024: 2}


@pytest.fixture(scope='module')
def vit_base():
    return backbones.VisionTransformer(arch='base', out_type='raw')


@pytest.fixture(scope='module')
def swin_base():
    return backbones.SwinTransformer(arch='base')


@pytest.mark.parametrize('method', sorted(PEFT_METHODS.module_dict))
def test_parameter_counts(method, vit_base, swin_base):
    """All methods on ViT-B/16 and Swin-B, against a closed formula and what was published."""
    if method == 'partial':  # all of the last block; Swin's has a table of relative positions for 32 heads
        expected = [12 * 768**2 + 13 * 768, 12 * 1024**2 + 13 * 1024 + (2 * 7 - 1) ** 2 * 32]
    elif method in ('full', 'frozen'):
        expected = [0, 0]
    else:
        expected = [
            12 * A_BLOCK[method](768) + VIT_REST.get(method, 0),
            sum(n * A_BLOCK[method](d) for d, n in SWIN_DEPTHS.items()) + SWIN_REST.get(method, 0),
        ]
    for model, count in zip((vit_base, swin_base), expected):
        if method == 'vpt' and model is swin_base:
            with pytest.raises(ValueError, match='mmpretrain Swin blocks .* take no prompt tokens'):
                inject(model, method)
            continue
        summary = inject(model, method)
        own = summary.backbone if method == 'full' else 0
        remove(model)
        assert (summary.adapters, summary.trainable) == (count, count + own)
        if model is vit_base and method in PUBLISHED:
            assert count == PUBLISHED[method]


def test_the_table_of_the_guide(vit_base, swin_base):
    """docs/methods.md lists every method, with what it trains."""
    text = (ROOT / 'docs' / 'methods.md').read_text(encoding='utf-8')
    rows = {
        cells[0].strip('` '): cells
        for cells in re.findall(r'^\| (`[\w-]+`) \|.*?\|.*?\| (.+) \| (yes|no) \|$', text, re.M)
    }
    assert set(rows) == set(PEFT_METHODS.module_dict)
    for method, (_, counts, merges) in rows.items():
        expected = []
        for model in (vit_base, swin_base):
            if method == 'vpt' and model is swin_base:
                expected += ['-', '-']
                continue
            summary = inject(model, method)
            expected += [f'{summary.trainable:,}', f'{summary.backbone_share:.2%}']
            attachments = get_injection(model).attachments
            remove(model)
        assert counts == ' | '.join(expected), method
        assert (merges == 'yes') == bool(attachments and isinstance(attachments[0], WeightMergingAttachment))


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
