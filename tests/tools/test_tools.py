"""The command-line tools, each in a process of its own, as a user runs them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from commands import call, scalars, tool
from conftest import ROOT, free_port
from safetensors.torch import load_file

from iconformer_mm.cli.export_backbone import main as export_backbone

DEIT = 'mmpretrain::deit/deit-tiny_4xb256_in1k'
QUICKSTART = 'configs/quickstart/vit-quickstart_icon_digits.py'


@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    """A few images in ImageNet's folders."""
    root = tmp_path_factory.mktemp('imagenet')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        lines = []
        for label in (0, 1):
            (root / split / str(label)).mkdir(parents=True)
            for index in range(2):
                image = rng.integers(0, 256, size=(240, 260, 3), dtype=np.uint8)
                cv2.imwrite(str(root / split / str(label) / f'{index}.JPEG'), image)
                lines.append(f'{label}/{index}.JPEG {label}')
        (root / 'meta').mkdir(exist_ok=True)
        (root / 'meta' / f'{split}.txt').write_text('\n'.join(lines))
    return root


def shrink(imagenet, epochs):
    """Options that make the stock ImageNet config small."""
    options = [
        f'train_cfg.max_epochs={epochs}',
        'param_scheduler=None',
        'train_dataloader.batch_size=2',
        'default_hooks.logger.interval=1',
    ]
    for loader in ('train', 'val', 'test'):
        options += [f'{loader}_dataloader.dataset.data_root={imagenet}', f'{loader}_dataloader.num_workers=0']
        options += [f'{loader}_dataloader.persistent_workers=False']
    return ['--cfg-options', *options]


def backbone(checkpoint):
    state = torch.load(checkpoint, map_location='cpu', weights_only=False)['state_dict']
    return {n: v for n, v in state.items() if n.startswith('backbone.') and 'adapter' not in n}, state


def test_one_flag_adapts_a_stock_config(imagenet, tmp_path):
    """Train, resume, test, and through the library's own tools: no file of ours but the flag."""
    option = 'default_hooks.peft.method.bottleneck=8'
    output = tool('train.py', DEIT, '--peft', 'icon', '--work-dir', tmp_path, *shrink(imagenet, 1), option)
    assert 'PEFT method: icon' in output and '12 x mmpretrain ViT' in output
    assert 'is skipped since its requires_grad' not in output
    first, state = backbone(tmp_path / 'epoch_1.pth')
    assert state['backbone.layers.0.adapter_attention.down.weight'].shape == (8, 192)

    output = tool('train.py', DEIT, '--peft', 'icon', '--work-dir', tmp_path, '--resume', *shrink(imagenet, 2), option)
    assert 'resumed epoch: 1' in output
    second, state = backbone(tmp_path / 'epoch_2.pth')
    assert all(torch.equal(second[name], first[name]) for name in first)
    assert state['backbone.layers.0.adapter_attention.up.weight'].abs().sum() > 0
    assert (tmp_path / 'adapter.safetensors').is_file()

    expected = [line for line in scalars(tmp_path) if 'accuracy/top1' in line][-1]['accuracy/top1']
    arguments = [DEIT, tmp_path / 'epoch_2.pth', '--peft', 'icon', '--metrics', tmp_path / 'metrics.json']
    tool('test.py', *arguments, '--work-dir', tmp_path / 'test', *shrink(imagenet, 1), option)
    assert json.loads((tmp_path / 'metrics.json').read_text())['accuracy/top1'] == expected


def test_three_lines_under_mmpretrains_own_tools(imagenet, tmp_path):
    config = tmp_path / 'three_lines.py'
    config.write_text(
        "_base_ = 'mmpretrain::deit/deit-tiny_4xb256_in1k.py'\n"
        "custom_imports = dict(imports=['iconformer_mm'])\n"
        "custom_hooks = [dict(type='PEFTHook')]\n"
    )
    tools = Path(find_spec('mmpretrain').submodule_search_locations[0]) / '.mim' / 'tools'
    options = shrink(imagenet, 1)
    output = call(sys.executable, tools / 'train.py', config, '--work-dir', tmp_path, *options, cwd=tmp_path)
    assert 'PEFT method: icon' in output
    assert any('adapter' in name for name in backbone(tmp_path / 'epoch_1.pth')[1])
    call(
        sys.executable,
        tools / 'test.py',
        config,
        tmp_path / 'epoch_1.pth',
        '--work-dir',
        tmp_path,
        *options,
        cwd=tmp_path,
    )


def test_two_processes_train_as_one(tmp_path):
    """dist_train.sh on the quickstart: the result of one process on the joint batch.

    Without random cropping, which draws anew in each process, and with a plain
    optimizer: Adam divides by the gradient's size and so makes rounding grow.
    """
    common = [
        'optim_wrapper.optimizer.type=SGD',
        'optim_wrapper.optimizer.lr=0.1',
        'train_cfg.max_epochs=2',
        'param_scheduler=None',
        'default_hooks.checkpoint.interval=2',
        'train_dataloader.dataset.pipeline.1.padding=0',
    ]
    tool('train.py', QUICKSTART, '--work-dir', tmp_path / 'one', '--cfg-options', *common)
    options = ['--work-dir', tmp_path / 'two', '--cfg-options', *common, 'train_dataloader.batch_size=25']
    call('bash', 'tools/dist_train.sh', QUICKSTART, 2, *options, PORT=free_port(), OMP_NUM_THREADS='1')
    one, two = (backbone(tmp_path / name / 'epoch_2.pth')[1] for name in ('one', 'two'))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=2e-5, rtol=1e-3, msg=name)
    assert one['backbone.layers.0.adapter_attention.up.weight'].abs().max() > 1e-4  # zero before training
    results = [[line for line in scalars(tmp_path / n) if 'accuracy/top1' in line][-1] for n in ('one', 'two')]
    assert abs(results[0]['accuracy/top1'] - results[1]['accuracy/top1']) < 0.5

    # And testing over two processes gives the accuracy that training reported.
    checkpoint = tmp_path / 'two' / 'epoch_2.pth'
    options = ['--work-dir', tmp_path / 'test', '--metrics', tmp_path / 'metrics.json']
    call('bash', 'tools/dist_test.sh', QUICKSTART, checkpoint, 2, *options, PORT=free_port(), OMP_NUM_THREADS='1')
    assert json.loads((tmp_path / 'metrics.json').read_text())['accuracy/top1'] == results[1]['accuracy/top1']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.py'], "config 'nowhere.py' not found: there is no file nowhere.py"),
        (['mmpretrain::nowhere'], "config 'mmpretrain::nowhere' not found"),
        (['mmnothing::x'], 'the package mmnothing is not installed'),
        ([QUICKSTART.replace('icon', 'frozen'), '--peft', 'icn'], "unknown PEFT method 'icn' (did you mean 'icon'?)"),
        (
            [QUICKSTART.replace('icon_digits', 'pretrain-strokes'), '--auto-scale-lr'],
            '--auto-scale-lr: the config has no',
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path):
    assert message in tool('train.py', *arguments, ok=False)


def test_mistakes_in_testing(tmp_path):
    assert 'checkpoint none.pth does not exist' in tool('test.py', QUICKSTART, 'none.pth', ok=False)
    assert 'checkpoint none.pth does not exist' in tool('export_backbone.py', 'none.pth', 'x', ok=False)


def test_a_whole_model_is_exported(tmp_path, capsys):
    """Of a detector that is pre-trained as a whole; without the option the backbone alone is written."""
    state = {'backbone.a': torch.ones(2), 'encoder.b': torch.zeros(3)}
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    for options, expected in (([], {'a'}), (['--whole'], set(state))):
        export_backbone([str(tmp_path / 'a.pth'), str(tmp_path / 'out.safetensors'), *options])
        written = load_file(tmp_path / 'out.safetensors')
        assert set(written) == expected and f'{len(expected)} tensors' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        export_backbone([str(tmp_path / 'a.pth'), 'x', '--whole', '--prefix', 'p.'])
    assert '--whole keeps the names of the model: leave out --prefix' in capsys.readouterr().err


def test_missing_data(tmp_path):
    config = 'configs/svhn/vit-base-p16-mae_frozen_8xb128-100e_svhn.py'
    options = ['model.backbone.init_cfg=None', f'train_dataloader.dataset.data_root={tmp_path}']
    options += ['optim_wrapper.type=OptimWrapper', 'optim_wrapper.loss_scale=None']
    output = tool('train.py', config, '--work-dir', tmp_path, '--cfg-options', *options, ok=False)
    assert f'SVHN file {tmp_path}/train_32x32.mat is missing' in output


def test_slurm(tmp_path):
    """What slurm_train.sh hands to srun."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    srun.chmod(0o755)
    command = ['tools/slurm_train.sh', 'gpu', 'job', 'config.py', 'out', '--amp']
    environment = {
        **os.environ,
        'PATH': f'{tmp_path}:{os.environ["PATH"]}',
        'GPUS': '16',
        'SRUN_ARGS': '--quiet --exclusive',
    }
    result = subprocess.run(['bash', *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    words = result.stdout.split()
    assert words[:3] == ['--partition=gpu', '--job-name=job', '--gres=gpu:8']
    assert '--ntasks=16' in words and '--quiet' in words and '--exclusive' in words
    assert words[-6:] == ['-u', 'tools/train.py', 'config.py', '--work-dir=out', '--launcher=slurm', '--amp']
