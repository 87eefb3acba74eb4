"""Adapted models under MMEngine's FlexibleRunner: one process, DDP, and sharded."""

import json

import pytest
import torch
from flexible_runs import BF16, ICON, LORA, assert_same, tiny, train, train_on, written
from mmengine.registry import MODELS
from safetensors.torch import save_file

from iconformer_mm.checkpoint import read_adapter
from iconformer_mm.engine import CheckedFlexibleRunner, build_runner
from iconformer_mm.engine.strategies import OLDEST_TORCH, complete_strategy

shards = pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split('.')[:2]) < OLDEST_TORCH, reason='sharding needs torch 2.7'
)


def test_one_process_trains_as_with_mmengines_runner(tmp_path):
    runner = train(tmp_path / 'flexible', runner_type='FlexibleRunner')
    assert type(runner) is CheckedFlexibleRunner
    train(tmp_path / 'plain')
    assert_same(written(tmp_path / 'flexible'), written(tmp_path / 'plain'), exact=True)
    # Resumed, and tested from the file.
    train(tmp_path / 'cut', epochs=1, runner_type='FlexibleRunner')
    train(tmp_path / 'cut', runner_type='FlexibleRunner', resume=True)
    assert_same(written(tmp_path / 'cut'), written(tmp_path / 'plain'), exact=True)
    checkpoint = str(tmp_path / 'plain' / 'epoch_2.safetensors')
    accuracies = [
        build_runner(tiny(tmp_path / 'test', load_from=checkpoint, **kind)).test()
        for kind in (dict(), dict(runner_type='FlexibleRunner'))
    ]
    assert accuracies[0] == accuracies[1]


STRATEGIES = {
    'ddp': dict(strategy=dict(type='DDPStrategy')),
    'sharded': dict(strategy=dict(type='FSDPStrategy')),
    'lora': dict(strategy=dict(type='FSDPStrategy'), hook=LORA),
    'bfloat16': dict(strategy=dict(type='FullyShardStrategy', reshard_after_forward=False), hook=BF16),
}


@shards
def test_two_processes_train_as_one_on_the_joint_batch(tmp_path):
    jobs = {n: dict(runner_type='FlexibleRunner', **o) for n, o in STRATEGIES.items()}
    jobs['cut'] = dict(jobs['sharded'], epochs=1)
    train_on(2, tmp_path, jobs)
    train_on(2, tmp_path, {'cut': dict(jobs['sharded'], resume=True)})
    expected = {}
    for name, hook in dict(icon=ICON, lora=LORA, bfloat16=BF16).items():
        train(tmp_path / name / 'one', hook=hook)
        expected[name] = written(tmp_path / name / 'one')
    assert_same(written(tmp_path / 'ddp'), expected['icon'])
    assert_same(written(tmp_path / 'sharded'), expected['icon'])
    assert_same(written(tmp_path / 'lora'), expected['lora'])
    # Sums in bfloat16 are rounded after other images, so gradients are alike at best.
    (*half, _, groups), (*alone, _, other) = written(tmp_path / 'bfloat16'), expected['bfloat16']
    assert_same((*half, groups), (*alone, other), atol=2e-3)
    assert_same(written(tmp_path / 'cut'), written(tmp_path / 'sharded'), exact=True)


@shards
def test_another_number_of_processes_resumes(tmp_path):
    train(tmp_path / 'one', epochs=3, batch_size=20)
    train(tmp_path / 'cut', epochs=1, batch_size=20)
    sharded = dict(runner_type='FlexibleRunner', strategy=dict(type='FSDPStrategy'), resume=True)
    train_on(4, tmp_path, {'cut': dict(sharded, epochs=2)}, total=20)
    train(tmp_path / 'cut', epochs=3, batch_size=20, resume=True)
    assert_same(written(tmp_path / 'cut', 3), written(tmp_path / 'one', 3))


def test_a_backbone_from_shards(tmp_path):
    """Built without values, adapted and filled; with MMEngine's Runner the same index is read whole."""
    cfg = tiny(tmp_path)
    backbone = MODELS.build(cfg.model.backbone)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    placed = {}
    for index, (name, value) in enumerate(backbone.state_dict().items()):
        placed[f'backbone.{name}'] = f'{index}.safetensors'
        save_file({f'backbone.{name}': value}, tmp_path / f'{index}.safetensors')
    (tmp_path / 'm.safetensors.index.json').write_text(json.dumps(dict(weight_map=placed)))
    init = dict(type='Pretrained', checkpoint=str(tmp_path / 'm.safetensors.index.json'), prefix='backbone.')
    found = {}
    for kind in (dict(), dict(runner_type='FlexibleRunner')):
        for frozen_dtype in (None, 'bfloat16'):
            folder = tmp_path / f'{len(kind)}{frozen_dtype}'
            changes = {'model.backbone.init_cfg': init, **kind}
            runner = train(folder, epochs=1, hook=dict(ICON, frozen_dtype=frozen_dtype), **changes)
            found[folder.name] = read_adapter(folder / 'adapter.safetensors')[0]['base_fingerprint']
            for name, value in backbone.state_dict().items():
                own = runner.model.backbone.state_dict()[name]
                assert torch.equal(own, value.to(own.dtype)), name
    assert (
        len(set(found.values())) == 2 and found['0None'] == found['1None'] and found['0bfloat16'] == found['1bfloat16']
    )


@pytest.mark.parametrize(
    ('strategy', 'launcher', 'error', 'message'),
    [
        (dict(type='FSDPStrategy'), 'none', ValueError, 'is for several processes: start them with'),
        (dict(type='FSDPStrategy', skip_init_weights=True), 'pytorch', ValueError, 'buffers that no file holds'),
        (dict(type='FSDPStrategy', state_dict_cfg='local'), 'pytorch', ValueError, 'gathered whole'),
        (dict(type='FSDPStrategy', activation_checkpointing={}), 'pytorch', ValueError, 'with_cp=True of the PEFTHook'),
        (dict(type='FSDPStrategy', units=3), 'pytorch', ValueError, "no option 'units'"),
        (
            dict(type='FSDPStrategy', model_wrapper=dict(cpu_offload=True)),
            'pytorch',
            ValueError,
            'no cpu_offload=True of `model_wrapper`',
        ),
    ],
)
def test_a_strategy_that_cannot_run_is_refused(strategy, launcher, error, message):
    with pytest.raises(error, match=message):
        complete_strategy(strategy, launcher)


def test_options_that_fully_shard_keeps():
    wrapper = dict(type='MMFullyShardedDataParallel', use_orig_params=True)
    given = dict(type='FSDPStrategy', model_wrapper=wrapper, state_dict_cfg='full', sync_bn='torch')
    assert complete_strategy(given, 'pytorch') == dict(type='FullyShardStrategy', sync_bn='torch')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(custom_hooks=[ICON, dict(type='EMAHook')]), 'EMAHook averages a model that is not wrapped'),
        (dict(hook=dict(ICON, prefix_cache=dict(dir='cache'))), "prefix_cache needs MMEngine's Runner"),
    ],
)
def test_hooks_that_do_not_fit_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path, runner_type='FlexibleRunner', **changes)


def test_wrong_weights_are_refused_before_wrapping(tmp_path):
    torch.save({'backbone.patch_embed.projection.bias': torch.zeros(32)}, tmp_path / 'part.pth')
    with pytest.raises(RuntimeError, match='frozen tensors are missing'):
        train(tmp_path, runner_type='FlexibleRunner', load_from=str(tmp_path / 'part.pth'))
