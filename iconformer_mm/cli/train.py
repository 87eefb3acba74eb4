"""Train a model, adapted by a PEFT method where the config or ``--peft`` says so."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from mmengine.config import Config

from iconformer_mm.analysis.inspection import find_mistakes
from iconformer_mm.engine import build_runner, exempt_from_collection, leave_process_group, load_config
from iconformer_mm.engine.config import check_precision, merge_options, use_amp
from iconformer_mm.tuning.accounting import NO_WEIGHTS

from .errors import user_errors
from .parser import add_base, guard, load_by_command_line, make_parser


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        type=os.path.expanduser,
        help='checkpoint to resume from; without a value, the latest in the work directory',
    )
    parser.add_argument('--no-validate', action='store_true', help='do not validate while training')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help="scale the learning rate to the batch size by the config's rule"
    )
    add_base(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Put the command line into the config."""
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise SystemExit('--auto-scale-lr: the config has no `auto_scale_lr.base_batch_size` to scale by')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        load_by_command_line(cfg, args, None if args.resume == 'auto' else args.resume)
    elif args.base is not None:
        raise SystemExit('--base is for --resume; to begin with the weights of a checkpoint give load_from')
    merge_options(cfg, args.cfg_options)
    if args.amp:
        use_amp(cfg)
    check_precision(cfg)


def train(args: argparse.Namespace) -> None:
    """Train as the command line says."""
    guard(args)
    cfg = load_config(args.config, args.peft)
    merge_args(cfg, args)
    runner = build_runner(cfg)
    exempt_from_collection()
    for mistake in find_mistakes(cfg, data=False):  # the runner looks at its data
        if mistake != NO_WEIGHTS:  # the runner says that itself, once it has seen what is loaded
            runner.logger.warning(mistake)
    runner.train()


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    train(parse_args(argv))
    leave_process_group()  # here, where nothing holds the wrapped model
