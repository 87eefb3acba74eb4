"""With one mm library, or none: what needs no other works, and what needs another says so.

The processes see all packages of this environment but those that are to be absent, with their metadata.
"""

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

ADAPT = """if True:
    import sys
    import torch
    from importlib.util import find_spec
    from families import FAMILIES, flatten, image
    from iconformer_mm import inject, load_adapter, remove, save_adapter, summarize

    present, name = sys.argv[1].split(), sys.argv[2]
    assert [n for n in ('mmpretrain', 'mmdet', 'mmseg', 'timm') if find_spec(n)] == present
    if name == 'timm':
        import timm
        def build():
            return timm.create_model('vit_tiny_patch16_224', img_size=64, embed_dim=32, depth=2, num_heads=2)
    else:
        (build,) = [family.build for family in FAMILIES if family.name == name]

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
"""


@pytest.fixture(scope='module')
def packages(tmp_path_factory):
    """Makes a folder with this environment's packages, of the mm libraries and timm only those named."""

    def make(*present):
        folder = tmp_path_factory.mktemp('packages')
        absent = [word for name, project in LIBRARIES.items() if name not in present for word in (name, project)]
        pattern = re.compile(rf'(onedl_)?({"|".join(absent)}|iconformer_mm)(-.*)?')
        for entry in Path(sysconfig.get_path('purelib')).iterdir():
            if pattern.fullmatch(entry.name) is None and entry.suffix != '.pth':
                (folder / entry.name).symlink_to(entry)
        return folder

    return make


def call(folder, *command, cwd, ok=True):
    """Run Python with the packages of a folder; return what it printed."""
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / 'tests')))
    env = {**os.environ, 'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', 'PIP_NO_INDEX': '1'}
    # -S: without the environment's own folder of packages
    command = [sys.executable, '-S', *map(str, command)]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert (result.returncode == 0) == ok, output[-5000:]
    return output


@pytest.mark.parametrize('library', CONFIGS)
def test_one_library(library, packages, tmp_path):
    """Inject, train, save, load; train by a config; and by a config of the others."""
    folder = packages(library)
    call(folder, '-c', ADAPT, library, BACKBONES[library], cwd=tmp_path)

    train = ROOT / 'tools' / 'train.py'
    options = ['--work-dir', 'out', '--peft', 'icon', '--cfg-options', 'default_hooks.peft.method.bottleneck=4']
    if library == 'mmpretrain':
        options += ['train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    else:
        make = ['--out', 'data/scenes', '--styles', 'target', '--train', 4, '--val', 4]
        call(folder, ROOT / 'tools' / 'dataset_converters' / 'make_scenes.py', *make, cwd=tmp_path)
        options += ['train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2']
    call(folder, train, f'iconformer_mm::{CONFIGS[library]}', *options, cwd=tmp_path)
    assert (tmp_path / 'out' / 'adapter.safetensors').is_file()

    other, config = next((name, config) for name, config in CONFIGS.items() if name != library)
    output = call(folder, train, f'iconformer_mm::{config}', cwd=tmp_path, ok=False)
    assert f"has the base '{other}::" in output and f'and the package {other} is not installed' in output
    assert 'Traceback' not in output


def test_timm_alone(packages, tmp_path):
    folder = packages('timm')
    call(folder, '-c', ADAPT, 'timm', 'timm', cwd=tmp_path)
    output = call(folder, ROOT / 'tools' / 'train.py', 'mmdet::swin/any', cwd=tmp_path, ok=False)
    assert output == "error: config 'mmdet::swin/any': the package mmdet is not installed\n"
    (tmp_path / 'mine.py').write_text("default_scope = 'mmseg'\nmodel = dict(type='EncoderDecoder')\n")
    output = call(folder, ROOT / 'tools' / 'train.py', 'mine.py', cwd=tmp_path, ok=False)
    assert (
        output == "error: config 'mine.py' is for mmseg (its default_scope), and the package mmseg is not installed\n"
    )
