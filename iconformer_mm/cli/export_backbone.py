"""Write the backbone of a checkpoint, or the whole model, as safetensors weights to start from."""

from __future__ import annotations

from collections.abc import Sequence

from iconformer_mm.checkpoint import DamagedFileError, save_safetensors
from iconformer_mm.checkpoint.reading import UntrustedFileError, read_checkpoint, state_dict_of
from iconformer_mm.files import expanded

from .parser import Parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(description=__doc__)
    parser.add_argument('checkpoint', type=expanded, help='checkpoint of a whole model, as mmengine writes it')
    parser.add_argument('out', type=expanded, help='safetensors file to write')
    parser.add_argument(
        '--prefix',
        default='',
        help="put before each name; MMDetection's Swin wants 'backbone.'",
    )
    parser.add_argument('--whole', action='store_true', help='write the whole model, for load_from')
    parser.add_argument('--trust', action='store_true', help='unpickle the checkpoint even if that could execute code')
    args = parser.parse_args(argv)
    if args.whole and args.prefix:
        parser.error('--whole keeps the names of the model: leave out --prefix')

    try:
        whole = state_dict_of(read_checkpoint(args.checkpoint, args.trust, advice='add --trust'), args.checkpoint)
    except (DamagedFileError, UntrustedFileError, FileNotFoundError) as error:
        raise SystemExit(f'error: {error}') from None
    prefix = '' if args.whole else 'backbone.'
    state = {name.removeprefix(prefix): value for name, value in whole.items() if name.startswith(prefix)}
    if not state:
        raise SystemExit(f'error: {args.checkpoint} is of no model with a backbone: it has no tensor {prefix}*')
    save_safetensors({args.prefix + name: value for name, value in state.items()}, args.out)
    count = sum(value.numel() for value in state.values())
    print(f'{args.out}: {len(state)} tensors, {count:,} values, {args.out.stat().st_size / 2**20:.2f} MiB')
