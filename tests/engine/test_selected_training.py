"""What was selected, through a run: training, checkpoints, resuming, the log, the command line."""

import re

import pytest
import torch
from interrupted_runs import Interrupted, equal, make, state
from tiny_runs import build

from iconformer_mm import inject, remove
from iconformer_mm.checkpoint import load_safetensors, read_adapter
from iconformer_mm.cli.adapter import main
from iconformer_mm.engine.optim_wrapper_constructor import PEFTOptimWrapperConstructor, describe_groups
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.freezing import is_adapter

SELECTED = dict(blocks='last:1', unfreeze=['patch_embed.*', 'cls_token'], freeze=['head.fc.bias'])


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    runs = {}
    for name in ('whole', 'parts'):
        runner = selected(tmp_path / name, interrupt=None if name == 'whole' else 10)
        if name == 'whole':
            start = state(runner)
            runner.train()
        else:
            with pytest.raises(Interrupted):
                runner.train()
            runner = selected(tmp_path / name, resume=True)
            runner.train()
        runs[name] = state(runner)
    assert equal(runs['whole'], runs['parts'])
    changed = {n for n, v in runs['whole'].items() if n in start and not torch.equal(v, start[n])}
    assert 'head.fc.bias' not in {n for n, p in runner.model.named_parameters() if p.requires_grad}
    assert {'backbone.patch_embed.projection.weight', 'backbone.cls_token'} <= changed

    checkpoint = load_safetensors(str(tmp_path / 'whole' / 'epoch_4.safetensors'))
    names = checkpoint['state_dict']
    assert 'backbone.cls_token' in names and 'head.fc.bias' in names and 'backbone.pos_embed' not in names
    assert {n.split('.adapter')[0] for n in names if is_adapter(n)} == {'backbone.layers.1'}

    # The base comes back after a resumed run, too.
    remove(runner.model)
    for name in ('backbone.patch_embed.projection.weight', 'backbone.cls_token'):
        assert not torch.equal(runner.model.state_dict()[name], runs['whole'][name])


def selected(work_dir, interrupt=None, resume=False, **options):
    custom_hooks = [dict(type='InterruptHook', at=interrupt)] if interrupt else []
    changes = {f'custom_hooks.0.{key}': value for key, value in {**SELECTED, **options}.items()}
    return make(work_dir, custom_hooks=custom_hooks, resume=resume, **changes)


def test_resuming_with_another_selection_is_refused(tmp_path):
    with pytest.raises(Interrupted):
        selected(tmp_path, interrupt=5).train()
    with pytest.raises(
        ValueError, match=r"trained with blocks='last:1', but the model is adapted with blocks='first:1'"
    ):
        selected(tmp_path, resume=True, blocks='first:1').train()
    with pytest.raises(ValueError, match=r'trained with unfreeze='):
        selected(tmp_path, resume=True, unfreeze=['cls_token']).train()


def test_the_command_line(tmp_path, capsys):
    with pytest.raises(Interrupted):
        selected(tmp_path, interrupt=5).train()
    runner = selected(tmp_path, resume=True)
    runner.train()
    last = tmp_path / 'epoch_4.safetensors'
    assert main(['extract', str(last), str(tmp_path / 'a.safetensors')]) == 0
    content, tensors = read_adapter(tmp_path / 'a.safetensors')
    own, there = read_adapter(tmp_path / 'adapter.safetensors')
    assert content['selection'] == own['selection'] == SELECTED
    assert equal(tensors, there) and content['base_fingerprint'] == own['base_fingerprint']

    base = {n: v for n, v in runner.model.state_dict().items() if not is_adapter(n)}
    base['backbone.cls_token'] = torch.zeros(1, 1, 32)  # which is no part of the fingerprint
    torch.save(dict(state_dict=base), tmp_path / 'base.pth')
    assert main(['verify', str(tmp_path / 'a.safetensors'), '--base', str(tmp_path / 'base.pth')]) == 0
    assert main(['apply', *(str(tmp_path / n) for n in ('base.pth', 'a.safetensors', 'whole.pth'))]) == 0
    whole = torch.load(tmp_path / 'whole.pth', weights_only=True)['state_dict']
    assert equal(whole, dict(runner.model.state_dict()))
    capsys.readouterr()
    assert main(['info', '--json', str(last)]) == 0
    assert f'"unfrozen_parameters": {32 + 8 * 8 * 32 + 32}' in capsys.readouterr().out


def test_a_backbone_of_another_name(tmp_path):
    """In files it is the backbone, in checkpoints of the model what it is there."""
    encoder = [
        dict(type='VisionTransformer', arch=dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64),
             img_size=32, patch_size=8, in_channels=1),
        dict(type='GlobalAveragePooling'),
    ]  # fmt: skip
    from mmengine.registry import init_default_scope
    from mmpretrain.registry import MODELS

    from iconformer_mm import load_adapter, save_adapter

    init_default_scope('mmpretrain')
    encoder[0]['out_type'] = 'featmap'

    def make_model():
        torch.manual_seed(0)
        head = dict(type='ArcFaceClsHead', num_classes=4, in_channels=32, init_cfg=None)
        return MODELS.build(
            dict(type='ImageToImageRetriever', image_encoder=encoder, head=head, prototype=torch.zeros(4, 32))
        )

    model = make_model()
    summary = inject(model, 'icon', bottleneck=4)
    assert summary.backbones == ['image_encoder.0'] and summary.parts['head'] == (128, 128)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    save_adapter(model, tmp_path / 'a.safetensors')
    content, tensors = read_adapter(tmp_path / 'a.safetensors')
    assert content['backbones'] == ['image_encoder.0']
    assert {n.partition('.')[0] for n in tensors} == {'backbone', 'head'}
    twin = make_model()
    load_adapter(twin, tmp_path / 'a.safetensors')
    assert equal(twin.state_dict(), model.state_dict())
    alone = make_model().image_encoder[0]
    load_adapter(alone, tmp_path / 'a.safetensors')
    assert get_injection(alone) is not None

    torch.save(dict(state_dict=make_model().state_dict()), tmp_path / 'base.pth')
    assert main(['apply', *(str(tmp_path / n) for n in ('base.pth', 'a.safetensors', 'whole.pth'))]) == 0
    whole = torch.load(tmp_path / 'whole.pth', weights_only=True)['state_dict']
    assert whole.keys() == model.state_dict().keys()


# Learning rates


def rows(text):
    """The rows of the table: kind, tensors, parameters, rate, decay."""
    cells = [[c.strip() for c in re.split('[│┃]', line)[1:-1]] for line in text.splitlines()]
    return [tuple(row) for row in cells if len(row) == 5 and row[1] != 'tensors']


def test_the_log_gives_the_rates(tmp_path, monkeypatch):
    runner = build(
        tmp_path,
        **{
            'optim_wrapper.paramwise_cfg': dict(
                adapter_lr_mult=2.0,
                custom_keys={'backbone': dict(lr_mult=0.1), 'head.fc.bias': dict(lr_mult=5.0, decay_mult=0.0)},
            ),
            'custom_hooks.0.unfreeze': ['cls_token'],
        },
    )
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    said = []
    monkeypatch.setattr(runner.logger, 'info', said.append)
    runner.call_hook('before_run')
    table = next(text for text in said if 'learning rates' in text)
    # Of the last block's adapter the filter is not trained: the head reads the class token alone.
    adapters = [p for n, p in runner.model.named_parameters() if is_adapter(n) and p.requires_grad]
    assert not any(
        p.requires_grad for n, p in runner.model.named_parameters() if 'layers.1.adapter_attention.icon' in n
    )
    count = f'{sum(p.numel() for p in adapters):,}'
    assert sorted(rows(table)) == sorted(
        [
            ('adapters', str(len(adapters)), count, '0.02', '0.1'),
            ('backbone', '1', '32', '0.001', '0.1'),
            ('head', '1', '128', '0.01', '0.1'),
            ('head', '1', '4', '0.05', '0'),
        ]
    )
    by_parameter = {id(p): g['lr'] for g in runner.optim_wrapper.param_groups for p in g['params']}
    assert {by_parameter[id(p)] for p in adapters} == {0.02}


def test_adapters_leave_groups_that_they_share():
    """A constructor that groups by rate puts adapters beside heads; their rate is their own all the same."""
    from families import VIT
    from mmpretrain.models import build_classifier

    model = build_classifier(
        dict(
            type='ImageClassifier',
            backbone=dict(type='VisionTransformer', arch=VIT, img_size=64),
            head=dict(type='LinearClsHead', num_classes=3, in_channels=32),
        )
    )
    inject(model, bottleneck=4)
    config = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    wrapper = PEFTOptimWrapperConstructor(config, dict(adapter_lr_mult=3.0))(model)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = {names[id(p)]: g['lr'] for g in wrapper.param_groups for p in g['params']}
    assert rates.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        assert rate == pytest.approx(0.3 if is_adapter(name) else 0.1), name
    assert {row[3] for row in rows(describe_groups(model, wrapper)) if row[0] == 'adapters'} == {'0.3'}
