"""Test a checkpoint, adapted by a PEFT method where the config or ``--peft`` says so."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import mmengine
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults

from iconformer_mm.engine import build_runner, exempt_from_collection, leave_process_group, load_config
from iconformer_mm.engine.config import merge_options
from iconformer_mm.registry import is_type

from .errors import user_errors
from .parser import add_base, guard, load_by_command_line, make_parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument('checkpoint', type=os.path.expanduser, help='checkpoint file')
    add_base(parser)
    parser.add_argument('--out', help='file (.pkl) for the predictions')
    parser.add_argument('--metrics', help='file (.json) for the metrics')
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument('--tta', action='store_true', help="test-time augmentation by the config's tta_model")
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Put the command line into the config."""
    cfg.launcher = args.launcher
    load_by_command_line(cfg, args, args.checkpoint)
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    for name in ('test_cfg', 'test_dataloader', 'test_evaluator'):
        if cfg.get(name) is None:
            raise SystemExit(f'error: the config has no `{name}` to test with')
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.show_dir is not None:
        if 'visualization' not in (cfg.get('default_hooks') or {}):
            raise SystemExit('--show-dir: the config has no `default_hooks.visualization` to draw with')
        hook = cfg.default_hooks.visualization
        if is_type(hook, 'DetVisualizationHook'):
            hook.update(draw=True, interval=1, test_out_dir=args.show_dir)
        elif is_type(hook, 'SegVisualizationHook'):
            hook.update(draw=True, interval=1)
            cfg.visualizer.save_dir = args.show_dir
        else:
            hook.update(enable=True, interval=1, out_dir=args.show_dir)
    if args.tta:
        if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
            raise SystemExit('--tta: the config has no `tta_model` and `tta_pipeline`')
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    merge_options(cfg, args.cfg_options)


def test(args: argparse.Namespace) -> None:
    """Test as the command line says."""
    if not os.path.isfile(args.checkpoint) and '://' not in args.checkpoint:
        raise SystemExit(f'checkpoint {args.checkpoint} does not exist')
    guard(args)
    cfg = load_config(args.config, args.peft)
    merge_args(cfg, args)
    runner = build_runner(cfg)
    exempt_from_collection()
    if args.out:
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if args.metrics:
        mmengine.dump(metrics, args.metrics)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    test(parse_args(argv))
    leave_process_group()  # here, where nothing holds the wrapped model
