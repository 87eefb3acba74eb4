"""Adapt a real DINOv2-S with three dense heads to the target scenes: score and seconds of each method.

    python benchmarks/dinov2_scenes.py [--jobs 2] [--out work_dirs/dinov2_scenes]

The base is fetched as `iconformer fetch-real` does it. A run that was interrupted goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from iconformer_mm.checkpoint import load_safetensors, save_safetensors
from iconformer_mm.checkpoint.real_base import fetch_base
from iconformer_mm.cli import compare
from iconformer_mm.cli.errors import user_errors
from iconformer_mm.cli.parser import Parser
from iconformer_mm.comparison.spec import ROOT
from iconformer_mm.files import expanded, written_whole

CONFIGS = ROOT / 'configs' / 'scenes' / 'real'
TASKS: dict[str, dict[str, Any]] = {
    'semantic': dict(config='upernet', metric='mIoU', title='UPerNet, semantic mIoU (%)', learning_rates=[3e-3]),
    'instance': dict(config='mask-rcnn', metric='coco/segm_mAP', title='Mask R-CNN, mask AP (%)', factor=100),
    'depth': dict(config='dpt', metric='rmse', title='DPT, depth RMSE (m)', digits=3, higher_is_better=False),
}


def comparison(checkpoint: Path, base: Path) -> dict[str, Any]:
    """The comparison as :mod:`iconformer_mm.cli.compare` reads it.

    Args:
        checkpoint: The pre-trained weights, in timm's names.
        base: The same in the names of the backbone, which frozen weights are compared with.
    """
    tasks = {
        name: dict(
            dict(learning_rates=[1e-3]) | task,
            config=str(CONFIGS / f'{task["config"]}_dinov2-scenes_target.py'),
            base=str(base),
            options={'model.backbone.init_cfg.checkpoint': str(checkpoint)},
            pictures=[3, 8],
        )
        for name, task in TASKS.items()
    }
    return dict(
        title='DINOv2-S adapted to the target scenes',
        seeds=[0],
        search_seed=100,
        tasks=tasks,
        methods=dict(
            frozen=dict(title='frozen backbone', method=dict(type='frozen')),
            icon=dict(title='iCoN', method=dict(type='icon')),
            full=dict(title='full fine-tuning', method=dict(type='full')),
        ),
    )


@user_errors
def main() -> None:
    """Run the comparison."""
    parser = Parser(description=__doc__)
    parser.add_argument('--tasks', nargs='+', choices=list(TASKS), default=list(TASKS), help='which tasks (all)')
    parser.add_argument('--jobs', type=int, default=2, help='runs at a time, one core each (2)')
    parser.add_argument('--out', type=expanded, default='work_dirs/dinov2_scenes', help='folder for all results')
    args = parser.parse_args()
    out = Path(args.out).resolve()
    checkpoint, base = fetch_base('timm'), out / 'base.safetensors'
    out.mkdir(parents=True, exist_ok=True)
    save_safetensors({f'timm_model.{name}': value for name, value in load_safetensors(str(checkpoint)).items()}, base)
    with written_whole(out / 'comparison.yaml') as temporary:
        temporary.write_text(yaml.safe_dump(comparison(checkpoint, base), sort_keys=False), encoding='utf-8')
    options = ['--out', str(out), '--jobs', str(args.jobs), '--tasks', *args.tasks]
    compare.main([str(out / 'comparison.yaml'), *options])


if __name__ == '__main__':
    main()
