"""Make an adapter file of an adapter that another program trained; see docs/migration.md.

python tools/convert_adapter.py CHECKPOINT --from adaptformer --config CONFIG --out adapter.safetensors
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from mmengine.runner import load_checkpoint

import iconformer_mm  # noqa: F401 (registers its parts)
from iconformer_mm import save_adapter, summarize
from iconformer_mm.adapter import UserError, read_base
from iconformer_mm.apis import load_config
from iconformer_mm.apis.inspection import build_model, names_weights
from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.checkpoint.foreign_adapters import inject_foreign, read_foreign
from iconformer_mm.command_line import Parser, one_line, user_errors
from iconformer_mm.tuning.injection import find_backbone


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.partition('\n')[0])
    parser.add_argument('checkpoint', type=Path, help='the file; of peft adapter_model.safetensors')
    parser.add_argument('--from', dest='kind', required=True, choices=['adaptformer', 'mona', 'hf-lora'])
    parser.add_argument('--config', required=True, help='config of the model that it is for: path or library::path')
    parser.add_argument('--base', help="checkpoint with the base weights (default: the config's pre-trained ones)")
    parser.add_argument('--scale', type=float, default=0.1, help="factor of AdaptFormer's adapters (0.1)")
    parser.add_argument('--out', type=Path, required=True, help='adapter file to write')
    parser.add_argument('--trust', action='store_true', help='unpickle the checkpoint even if that could execute code')
    return parser.parse_args()


@user_errors
def main() -> None:
    """Run the tool."""
    args = parse_args()
    try:
        foreign = read_foreign(args.kind, args.checkpoint, partial(read_base, trust=args.trust), args.scale)
        cfg = load_config(args.config)
        if args.base is None and not names_weights(cfg.model):
            raise UserError('the config names no pre-trained weights (init_cfg), so give the base as --base')
        model = build_model(cfg)
        if args.base is None:
            model.init_weights()
        else:
            load_checkpoint(model, args.base, map_location='cpu', logger='silent')
        inject_foreign(model, foreign)
    except (UserError, DamagedFileError, FileNotFoundError, ValueError) as error:
        raise SystemExit(f'error: {one_line(error).replace("--trust-base", "--trust")}') from None
    save_adapter(find_backbone(model), args.out, metadata=dict(converted_from=f'{args.kind}: {args.checkpoint.name}'))
    print(f'{args.out}: {foreign.method}, {summarize(model).adapters:,} parameters in {len(foreign.blocks)} blocks')


if __name__ == '__main__':
    main()
