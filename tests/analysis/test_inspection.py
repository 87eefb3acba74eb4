"""What a config would train is said before it is trained."""

import json
import sys
from importlib import import_module

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS

from iconformer_mm import inject, save_adapter
from iconformer_mm.analysis.inspection import find_mistakes, inspect_model
from iconformer_mm.checkpoint import save_safetensors
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import build_model, method_of
from iconformer_mm.tuning.accounting import NO_WEIGHTS

DIGITS = 'configs/quickstart/vit-quickstart_icon_digits.py'
SWIN = dict(embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])


def test_inspection_of_the_quickstart(root):
    cfg = load_config(str(root / DIGITS))
    inspection = inspect_model(cfg, (28, 28))
    model = build_model(cfg)
    assert inspection.summary == inject(model, 'icon', bottleneck=16)
    assert [name for name, *_ in inspection.sites] == [f'layers.{i}' for i in range(4)]
    assert sum(count for *_, count in inspection.sites) == inspection.summary.adapters
    cost, full = inspection.cost, inspection.full
    assert (
        cost.gradient_mib == cost.checkpoint_mib == cost.optimizer_mib / 2 == inspection.summary.trainable * 4 / 2**20
    )
    assert full.gradient_mib == sum(p.numel() for p in build_model(cfg).parameters()) * 4 / 2**20
    # Down and up projection of 16 channels, and little besides, over 4 blocks of width 96 with 50 tokens.
    projections = 4 * 2 * 2 * 50 * 96 * 16 / 1e9
    assert projections <= cost.gflop - full.gflop < 1.1 * projections
    assert 0.4 < cost.stored_mib / full.stored_mib < 0.8
    assert inspection.mistakes == []


def config(**changes):
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                backbone=dict(
                    type='SwinTransformer',
                    arch=SWIN,
                    img_size=64,
                    pad_small_map=True,
                    init_cfg=dict(type='Pretrained', checkpoint='a.pth'),
                ),
                head=dict(type='LinearClsHead', num_classes=4, in_channels=128),
            ),
            custom_hooks=[dict(type='PEFTHook', method=dict(type='icon'))],
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model.backbone.init_cfg': None}, 'no pre-trained weights are named'),
        ({'model.backbone.frozen_stages': 1}, 'frozen_stages=1 has no effect'),
        ({'find_unused_parameters': True}, 'find_unused_parameters costs time'),
        ({'model_wrapper_cfg': dict(type='A', find_unused_parameters=True)}, 'find_unused_parameters costs time'),
        ({'optim_wrapper.optimizer.lr': 2e-5}, 'lr=2e-05 is a rate for full fine-tuning'),
    ],
)
def test_mistakes(changes, message):
    (found,) = find_mistakes(config(**changes))
    assert message in found


@pytest.mark.parametrize(
    'changes',
    [
        {},
        {'custom_hooks': [], 'model.backbone.init_cfg': None},
        {'model.backbone.init_cfg': None, 'load_from': 'whole.pth'},
        {'model.backbone.init_cfg': None, 'model.pretrained': 'backbone.pth'},
        {'custom_hooks': [], 'model.backbone.type': 'ICoNSwinTransformer'},
        {'custom_hooks': [dict(type='PEFTHook', method='full')], 'model.backbone.frozen_stages': 1},
        {'optim_wrapper.optimizer': dict(type='SGD', lr=1e-5)},
    ],
)
def test_nothing_to_say(changes):
    assert find_mistakes(config(**changes)) == []


def timm(**options):
    return {'model.backbone': dict(_delete_=True, model_name='vit_tiny_patch16_224', **options)}


@pytest.mark.parametrize(
    ('backbone', 'named'),
    [
        (timm(type='TIMMBackbone'), False),
        (timm(type='TIMMBackbone', pretrained=True), True),
        (timm(type='TIMMBackbone', checkpoint_path='w.pth'), True),
        (timm(type='mmseg.TIMMBackbone'), True),  # there it is the default
        (timm(type='mmseg.TIMMBackbone', pretrained=False), False),
        (timm(type='mmseg.ICoNTIMMBackbone'), True),
        (timm(type='mmpretrain.ICoNTIMMBackbone'), False),
    ],
)
def test_weights_that_timm_loads_itself_are_named(backbone, named):
    assert (NO_WEIGHTS in find_mistakes(config(**backbone))) != named


def test_an_adapter_file_names_no_base(tmp_path):
    model = build_model(config())
    inject(model)
    save_adapter(model, tmp_path / 'a.safetensors')
    save_safetensors(dict(x=torch.zeros(1)), tmp_path / 'b.safetensors')
    none = {'model.backbone.init_cfg': None}
    assert find_mistakes(config(load_from=str(tmp_path / 'a.safetensors'), **none)) == [NO_WEIGHTS]
    assert find_mistakes(config(load_from=str(tmp_path / 'b.safetensors'), **none)) == []


def test_the_hook_alone_is_icon():
    """A PEFTHook without a method has one by default."""
    hook = config(custom_hooks=[dict(type='PEFTHook')])
    assert inspect_model(hook, (64, 64)).as_dict() == inspect_model(config(), (64, 64)).as_dict()


def test_born_adapted_backbones():
    """The same as by the hook."""
    by_hook = inspect_model(config(), (64, 64))
    born = config(**{'custom_hooks': [], 'model.backbone.type': 'ICoNSwinTransformer'})
    assert inspect_model(born, (64, 64)).as_dict() == by_hook.as_dict()


def test_wherever_the_backbone_is():
    backbone = dict(type='ICoNSwinTransformer', frozen_stages=2)
    cfg = Config(dict(model=dict(type='SemiBaseDetector', detector=dict(type='RetinaNet', backbone=backbone))))
    weights, stages = find_mistakes(cfg)
    assert 'no pre-trained weights are named' in weights and 'frozen_stages=2 has no effect' in stages


def test_what_is_selected_is_known():
    options = dict(blocks='last:2', unfreeze=['patch_embed.*'], freeze=['head.*'])
    hook = dict(type='PEFTHook', method='adaptformer', **options)
    inspection = inspect_model(config(custom_hooks=[hook]), (64, 64))
    model = build_model(config())
    assert inspection.summary == inject(model, 'adaptformer', **options)
    assert [name for name, *_ in inspection.sites] == ['stages.2.blocks.1', 'stages.3.blocks.0']
    built = Config(dict(custom_hooks=[HOOKS.build(hook)]))
    again = build_model(config())
    assert inject(again, **method_of(built)) == inspection.summary


def test_what_a_prefix_cache_would_save(root):
    cfg = load_config(str(root / DIGITS))
    hook = cfg.custom_hooks[0]
    assert inspect_model(cfg, (28, 28)).prefix is None  # all blocks are adapted
    hook.blocks = 'last:1'
    inspection = inspect_model(cfg, (28, 28))
    prefix = inspection.prefix
    assert (prefix.blocks, prefix.all_blocks) == (3, 4)
    assert prefix.mib == 50 * 96 * 4 / 2**20  # 50 tokens of width 96 in float32
    assert 0.25 < prefix.gflop / inspection.cost.gflop < 0.35
    hook.method = dict(type='frozen')
    hook.blocks = 'all'
    frozen = inspect_model(cfg, (28, 28)).prefix
    assert frozen.blocks == 4 and frozen.mib < prefix.mib and frozen.gflop < 0.1 * prefix.gflop


def test_a_prefix_cache_that_cannot_work_is_a_mistake(root):
    cfg = load_config(str(root / DIGITS))
    cfg.custom_hooks[0].prefix_cache = dict(dir='cache')
    (mistake,) = inspect_model(cfg, (28, 28)).mistakes
    assert "'layers.0' is trained, and no frozen block comes before it" in mistake


def inspect(monkeypatch, root, *arguments):
    monkeypatch.syspath_prepend(str(root / 'tools'))
    monkeypatch.setattr(sys, 'argv', ['inspect_model.py', *map(str, arguments)])
    import_module('inspect_model').main()


def test_the_tool(root, monkeypatch, capsys):
    inspect(monkeypatch, root, root / DIGITS, '--shape', 28, 28)
    text = capsys.readouterr().out
    assert 'layers.0 to 3: 4 x mmpretrain ViT, 5,776 parameters each' in text and 'full fine-tuning' in text
    assert 'frozen prefix' not in text
    inspect(monkeypatch, root, root / DIGITS, '--shape', 28, 28, '--cfg-options', 'custom_hooks.0.blocks=last:1')
    assert 'frozen prefix: 3 of 4 blocks' in capsys.readouterr().out
    inspect(monkeypatch, root, root / DIGITS, '--peft', 'frozen', '--shape', 28, 28, '--json')
    content = json.loads(capsys.readouterr().out)
    assert content['summary']['method'] == 'frozen' and content['sites'] == []
    with pytest.raises(SystemExit, match='unknown PEFT method'):
        inspect(monkeypatch, root, root / DIGITS, '--peft', 'icom')
