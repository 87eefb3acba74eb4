"""Make an adapter file of an adapter that another program trained; see docs/migration.md.

python tools/convert_adapter.py CHECKPOINT --from adaptformer --config CONFIG --out adapter.safetensors
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from functools import partial

from mmengine.runner import load_checkpoint
from torch import nn

from iconformer_mm import save_adapter, summarize
from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.checkpoint.foreign_adapters import (
    ForeignAdapter,
    inject_foreign,
    lora_model_of,
    read_foreign,
    read_mmpretrain_lora,
)
from iconformer_mm.checkpoint.reading import guard_loading
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import build_model, names_weights
from iconformer_mm.files import expanded
from iconformer_mm.messages import one_line
from iconformer_mm.tuning.injection import find_backbone

from .adapter import UserError, read_base
from .errors import user_errors
from .parser import Parser

KINDS = ('adaptformer', 'mona', 'hf-lora', 'mmpretrain-lora')


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.partition('\n')[0])
    parser.add_argument('checkpoint', type=expanded, help='the file; of peft adapter_model.safetensors')
    parser.add_argument('--from', dest='kind', required=True, choices=KINDS)
    parser.add_argument('--config', required=True, help='config of the model that it is for: path or library::path')
    parser.add_argument(
        '--base',
        type=os.path.expanduser,
        help="checkpoint with the base weights (default: the config's pre-trained ones)",
    )
    parser.add_argument('--scale', type=float, default=0.1, help="factor of AdaptFormer's adapters (0.1)")
    parser.add_argument(
        '--alpha', type=float, help="alpha of MMPretrain's LoRAModel, where --config is not that of its training"
    )
    parser.add_argument('--out', type=expanded, required=True, help='adapter file to write')
    parser.add_argument('--trust', action='store_true', help='unpickle the checkpoint even if that could execute code')
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> tuple[nn.Module, ForeignAdapter]:
    """The model that the adapter is for, adapted by it.

    Raises:
        UserError: What is needed is not given.
        ValueError: The adapter cannot be taken over.
    """
    load = partial(read_base, trust=args.trust)
    foreign, state = None, {}
    if args.kind == 'mmpretrain-lora':
        state = load(args.checkpoint)
    else:
        foreign = read_foreign(args.kind, args.checkpoint, load, args.scale)
    cfg = load_config(args.config)
    cfg.model, options = lora_model_of(cfg.model)
    if args.base is None and not names_weights(cfg.model):
        raise UserError('the config names no pre-trained weights (init_cfg), so give the base as --base')
    model = build_model(cfg)
    if args.base is None:
        model.init_weights()
    else:
        load_checkpoint(model, args.base, map_location='cpu', logger='silent')
    if foreign is None:
        if args.alpha is not None:
            options = dict(alpha=args.alpha)
        if options is None:
            raise UserError(
                'the checkpoint does not say its alpha: give the config with the LoRAModel as --config, or --alpha'
            )
        foreign = read_mmpretrain_lora(state, model, options)
    inject_foreign(model, foreign)
    return model, foreign


def name_left(names: list[str]) -> str:
    """What of the file is not taken over, by the first words of the names."""
    prefix = 'base_model.model.'  # of peft
    count = Counter(name.removeprefix(prefix).partition('.')[0] for name in names)
    return ', '.join(f'{word} ({number} tensors)' for word, number in count.items())


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(argv)
    guard_loading(args.trust, 'add --trust')
    try:
        model, foreign = convert(args)
        save_adapter(
            find_backbone(model), args.out, metadata=dict(converted_from=f'{args.kind}: {args.checkpoint.name}')
        )
    except (UserError, DamagedFileError, FileNotFoundError, ValueError) as error:
        raise SystemExit(f'error: {one_line(error).replace("--trust-base", "--trust")}') from None
    print(f'{args.out}: {foreign.method}, {summarize(model).adapters:,} parameters in {len(foreign.blocks)} blocks')
    if foreign.left:
        print(f'not taken over: {name_left(foreign.left)}')
