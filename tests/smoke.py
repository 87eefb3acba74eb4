"""Adapts a small model with what is installed, as a user would; for machines that have one library.

    python smoke.py quickstart|det|seg|timm

Run it away from the checkout, so that the installed wheel is what is tried. It works in the current folder.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

SCENES = ('--out', 'data/scenes', '--styles', 'target', '--train', '4', '--val', '4')
SHORT = ('train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2')
# An extra's name: a config, and what makes its training short.
CONFIGS = {
    'quickstart': ('quickstart/vit-quickstart_icon_digits.py', ('train_cfg.max_epochs=6', 'train_cfg.val_interval=6')),
    'det': ('scenes/mask-rcnn_swin-scenes_fpn_icon_target.py', SHORT),
    'seg': ('scenes/upernet_swin-scenes_icon_target.py', SHORT),
}


def run(*command: str | Path) -> None:
    """Run a command; end with it if it fails."""
    print('+', *command, flush=True)
    status = subprocess.run([str(word) for word in command]).returncode
    if status:
        raise SystemExit(status)


def train(extra: str) -> None:
    """Train a config of the package by its console script, and read the adapter file."""
    import iconformer_mm

    config, options = CONFIGS[extra]
    script = Path(sysconfig.get_path('scripts'), 'iconformer')
    if extra != 'quickstart':
        converters = Path(iconformer_mm.__file__).parent / '.mim' / 'tools' / 'dataset_converters'
        run(sys.executable, converters / 'make_scenes.py', *SCENES)
    run(script, 'train', f'iconformer_mm::{config}', '--work-dir', 'out', '--cfg-options', *options)
    run(script, 'adapter', 'info', Path('out', 'adapter.safetensors'))


def adapt_timm() -> None:
    """Adapt a model of timm, write its adapter and load it into another."""
    import timm
    import torch

    from iconformer_mm import inject, load_adapter, save_adapter

    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        return timm.create_model('vit_tiny_patch16_224', img_size=64, embed_dim=32, depth=2, num_heads=2).eval()

    images = torch.randn(2, 3, 64, 64)
    model, fresh = make(), make()
    before = model(images)
    print(inject(model, 'icon', bottleneck=4))
    assert torch.equal(model(images), before), 'an adapter changes the model before it is trained'
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(images).square().mean().backward()
    optimizer.step()
    save_adapter(model, 'adapter.safetensors')
    load_adapter(fresh, 'adapter.safetensors')
    assert not torch.equal(model(images), before), 'training changes nothing'
    assert torch.equal(fresh(images), model(images)), 'the loaded adapter computes something else'


def main() -> None:
    """Run what the command line asks for."""
    if len(sys.argv) != 2 or sys.argv[1] not in (*CONFIGS, 'timm'):
        raise SystemExit(__doc__)
    if sys.argv[1] == 'timm':
        adapt_timm()
    else:
        train(sys.argv[1])
    print(f'{sys.argv[1]}: all is well')


if __name__ == '__main__':
    main()
