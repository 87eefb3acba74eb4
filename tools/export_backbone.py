"""Write the backbone of a checkpoint as safetensors weights to pre-train from."""

from __future__ import annotations

from pathlib import Path

from mmengine.runner.checkpoint import _load_checkpoint_with_prefix

from iconformer_mm.checkpoint import save_safetensors
from iconformer_mm.command_line import Parser


def main() -> None:
    """Run the tool."""
    parser = Parser(description=__doc__)
    parser.add_argument('checkpoint', help='checkpoint of a whole model, as mmengine writes it')
    parser.add_argument('out', type=Path, help='safetensors file to write')
    parser.add_argument(
        '--prefix',
        default='',
        help="put before each name; MMDetection's Swin wants 'backbone.'",
    )
    args = parser.parse_args()

    if not Path(args.checkpoint).is_file():
        raise SystemExit(f'checkpoint {args.checkpoint} does not exist')
    state = _load_checkpoint_with_prefix('backbone.', args.checkpoint, map_location='cpu')
    save_safetensors({args.prefix + name: value for name, value in state.items()}, args.out)
    count = sum(value.numel() for value in state.values())
    print(f'{args.out}: {len(state)} tensors, {count:,} values, {args.out.stat().st_size / 2**20:.2f} MiB')


if __name__ == '__main__':
    main()
