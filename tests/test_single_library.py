"""With one mm library, or none: what needs no other works, and what needs another says so.

The processes see all packages of this environment but those that are to be absent, with their metadata.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

LIBRARIES = {'mmpretrain': 'mmpretrain', 'mmdet': 'mmdetection', 'mmseg': 'mmsegmentation', 'timm': 'timm'}
CONFIGS = {
    'mmpretrain': 'quickstart/vit-quickstart_full_digits.py',
    'mmdet': 'scenes/mask-rcnn_swin-scenes_fpn_full_target.py',
    'mmseg': 'scenes/upernet_swin-scenes_full_target.py',
}
# A name of a backbone in tests/families.py
BACKBONES = {'mmpretrain': 'ViT', 'mmdet': 'mmdet Swin', 'mmseg': 'mmseg MiT'}
TRAIN = str(ROOT / 'tools' / 'train.py')
MAKE_SCENES = str(ROOT / 'tools' / 'dataset_converters' / 'make_scenes.py')

PROGRAM = """if True:
    import json, runpy, sys
    import torch
    from importlib.util import find_spec
    from families import FAMILIES, flatten, image
    from iconformer_mm import inject, load_adapter, remove, save_adapter

    task = json.load(open('task.json'))
    assert [n for n in ('mmpretrain', 'mmdet', 'mmseg', 'timm') if find_spec(n)] == [task['library']]
    if task['library'] == 'timm':
        import timm
        def build():
            return timm.create_model('vit_tiny_patch16_224', img_size=64, embed_dim=32, depth=2, num_heads=2)
    else:
        (build,) = [family.build for family in FAMILIES if family.name == task['backbone']]

    def make():
        torch.manual_seed(0)
        model = build()
        model.requires_grad_(False).eval()  # attention kernels depend on the former; the latter returns None at times
        return model

    model, x = make(), image((64, 64))
    before = flatten(model(x))
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    inject(model, 'icon', bottleneck=4)
    assert all(torch.equal(a, b) for a, b in zip(flatten(model(x)), before))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    sum(out.square().mean() for out in flatten(model(x))).backward()
    optimizer.step()
    trained = flatten(model(x))
    assert any(not torch.equal(a, b) for a, b in zip(trained, before))
    save_adapter(model, 'adapter.safetensors')
    other = make()
    load_adapter(other, 'adapter.safetensors')
    assert all(torch.equal(a, b) for a, b in zip(flatten(other(x)), trained))
    remove(model)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters())

    refusals = []
    for tool, *arguments in task['tools']:
        sys.argv = [tool, *arguments]
        try:
            runpy.run_path(tool, run_name='__main__')
        except SystemExit as error:
            refusals.append(str(error))
    json.dump(refusals, open('refusals.json', 'w'))
"""


def run(library, tools, folder, tmp_path):
    """Adapt a backbone, then run tools, in a process that has no other library; return what was refused.

    Args:
        library: The one that is to be there.
        tools: Command lines.
        folder: Where the packages of the process are put together.
        tmp_path: Where it works.
    """
    absent = [word for name, project in LIBRARIES.items() if name != library for word in (name, project)]
    hidden = re.compile(rf'((onedl_)?({"|".join(absent)}|iconformer_mm)(-.*)?|.*\.pth)')
    for entry in Path(sysconfig.get_path('purelib')).iterdir():
        if hidden.fullmatch(entry.name) is None:
            (folder / entry.name).symlink_to(entry)
    task = dict(library=library, backbone=BACKBONES.get(library), tools=tools)
    (tmp_path / 'task.json').write_text(json.dumps(task))
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / 'tests')))
    env = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', 'PIP_NO_INDEX': '1'}
    # -S: without the environment's own folder of packages
    command = [sys.executable, '-S', '-c', PROGRAM]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    return json.loads((tmp_path / 'refusals.json').read_text())


@pytest.mark.parametrize('library', CONFIGS)
def test_one_library(library, tmp_path, tmp_path_factory):
    """Inject, train, save, load; train by a config; and by a config of another."""
    options = ['--work-dir', 'out', '--peft', 'icon', '--cfg-options', 'default_hooks.peft.method.bottleneck=4']
    if library == 'mmpretrain':
        tools = []
        options += ['train_cfg.max_epochs=6', 'train_cfg.val_interval=6']  # warm-up takes five
    else:
        tools = [[MAKE_SCENES, '--out', 'data/scenes', '--styles', 'target', '--train', '4', '--val', '4']]
        options += ['train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2']
    tools.append([TRAIN, f'iconformer_mm::{CONFIGS[library]}', *options])
    absent = next(name for name in CONFIGS if name != library)
    tools.append([TRAIN, f'iconformer_mm::{CONFIGS[absent]}'])
    (refusal,) = run(library, tools, tmp_path_factory.mktemp('packages'), tmp_path)
    assert refusal.startswith('error: ') and f"has the base '{absent}::" in refusal
    assert refusal.endswith(f'and the package {absent} is not installed')
    assert (tmp_path / 'out' / 'adapter.safetensors').is_file()


def test_timm_alone(tmp_path, tmp_path_factory):
    (tmp_path / 'mine.py').write_text("default_scope = 'mmseg'\nmodel = dict(type='EncoderDecoder')\n")
    tools = [[TRAIN, 'mmdet::swin/any'], [TRAIN, 'mine.py']]
    assert run('timm', tools, tmp_path_factory.mktemp('packages'), tmp_path) == [
        "error: config 'mmdet::swin/any': the package mmdet is not installed",
        "error: config 'mine.py' is for mmseg (its default_scope), but the package mmseg is not installed",
    ]
