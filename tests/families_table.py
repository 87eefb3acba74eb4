"""Check every method on a tiny model of every block family, and write the table in docs/families.md.

python tests/families_table.py
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, MORE_FAMILIES, Family, flatten, image, stir
from torch import Tensor, nn

from iconformer_mm import inject, remove
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning.families import REFUSED

ROOT = Path(__file__).resolve().parent.parent

DOC = ROOT / 'docs' / 'families.md'
METHODS = sorted(set(PEFT_METHODS.module_dict) - {'full', 'frozen'})
STARTS_ELSEWHERE = ('ssf', 'mona', 'vpt')  # by their papers; all others start at the pre-trained model
# Letters for why a method is refused, by words of its error.
REASONS = {
    'p': (
        'take no prompt tokens',
        'attention is windowed or depends on positions, and takes no prompt tokens',
    ),
    'e': (
        'size of a patch is unknown',
        'no patch embedding, whose size prompts are initialised by, is around the blocks',
    ),
    'g': ('have no grid', 'the tokens lie on no grid, or not in the order of the image'),
    'a': ('blocks have no attention', 'the blocks have no attention; with `sites=["ffn"]` the method works'),
    'q': ('blocks have no linear map', 'the blocks have no attention; with `targets=["fc1", "fc2"]` the method works'),
    'm': ('no linear map', 'the blocks have no such linear maps; `targets` says which there are'),
}


def make(family: Family) -> nn.Module:
    """A frozen tiny model in which no bias is zero and no norm or scale is one."""
    torch.manual_seed(0)
    model = family.build()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.requires_grad_(False)
    model.eval()  # which of some backbones returns nothing
    return model


def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return flatten(model(x))


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _faults(model: nn.Module, method: str, family: Family, before: dict[Any, list[Tensor]]) -> str:
    """What is wrong with an adapted model; empty where nothing is."""
    for size, expected in before.items():
        if _equal(_run(model, image(size)), expected) == (method in STARTS_ELSEWHERE):
            return 'other outputs before training'
    stir(model)
    outputs = flatten(model(image(family.sizes[-1])))
    if _equal([t.detach() for t in outputs], before[family.sizes[-1]]):
        return 'no effect'
    # Not the mean of squares, which a last norm makes the same whatever comes in.
    sum((t.float() * torch.randn_like(t.float())).sum() for t in outputs).backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    # PiT hands on its class token only; whether its maps are asked for is not known when it is adapted.
    if family.name == 'timm PiT':
        without = [n for n in without if not any(part in n for part in ('.icon.', '.convs.', '.projector.'))]
    if without:
        return f'no gradient at {without[0]}'
    if any(p.grad is not None for n, p in model.named_parameters() if 'adapter' not in n):
        return 'gradients in the base'
    return ''


def check(method: str, family: Family) -> str:
    """``'yes'``, the letter of the reason for which a method is refused, or ``'wrong: ...'``."""
    model = make(family)
    keys = list(model.state_dict())
    # One method of each way to be attached sees all sizes.
    sizes = family.sizes if method in ('icon', 'adapter', 'vpt') else family.sizes[-1:]
    before = {size: _run(model, image(size)) for size in sizes}
    try:
        inject(model, method)
    except ValueError as error:
        if list(model.state_dict()) != keys or any('forward' in vars(m) for m in model.modules()):
            return 'wrong: a refused model is changed'
        return next((letter for letter, (words, _) in REASONS.items() if words in str(error)), f'wrong: {error}')
    model.eval()
    try:
        fault = _faults(model, method, family, before)
    except Exception as error:
        return f'wrong: {type(error).__name__}: {error}'
    remove(model)
    model.eval()
    if list(model.state_dict()) != keys or not all(_equal(_run(model, image(s)), before[s]) for s in sizes):
        fault = fault or 'not removed'
    return f'wrong: {fault}' if fault else 'yes'


def library_of(family: Family) -> str:
    """The library that a family is of."""
    first = family.name.partition(' ')[0]
    return first if first in ('timm', 'mmdet', 'mmseg') else 'mmpretrain'


def row_of(family: Family) -> str:
    """A row of the table."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):
        warnings.simplefilter('ignore')
        cells = [check(method, family) for method in METHODS]
    name = family.name.removeprefix(library_of(family)).strip()
    return f'| {library_of(family)} | {name} | {" | ".join(cells)} | {cells.count("yes")} of {len(cells)} |'


def main() -> int:
    """Write the table; 1 if anything is wrong."""
    rows = [row_of(family) for family in (*FAMILIES, *MORE_FAMILIES)]
    rows.sort(key=lambda row: row.partition('| ')[2].partition(' ')[0])
    cells = {library: Counter[str]() for library in ('mmpretrain', 'mmdet', 'mmseg', 'timm')}
    numbers = Counter(row.split('|')[1].strip() for row in rows)
    for row in rows:
        library, _, *kinds = (cell.strip() for cell in row.strip('|').split('|'))
        cells[library].update('yes' if kind == 'yes' else 'refused' for kind in kinds[:-1])
    text = [
        '# Block families, libraries and methods',
        '',
        'Written by `python tests/families_table.py`, and checked by `tests/tuning/test_families.py` and '
        '`tests/tuning/test_methods.py`, on a tiny model of each kind.',
        '',
        '`yes` says that all of this holds. Before training the outputs are those of the frozen backbone to the last '
        'bit; `ssf`, `mona` and `vpt` start elsewhere, by their papers. Every trained parameter gets a gradient, and '
        'nothing of the base does. `remove` gives the backbone back.',
        '',
        '| library | models | methods that work | refused, with the reason |',
        '|---|---|---|---|',
        *(f'| {name} | {numbers[name]} | {c["yes"]} | {c["refused"]} |' for name, c in cells.items()),
        '',
        '| library | model | ' + ' | '.join(METHODS) + ' | works |',
        '|' + '---|' * (len(METHODS) + 3),
        *rows,
        '',
        'Where a method is refused:',
        '',
        *(f'- `{letter}`: {text}.' for letter, (_, text) in REASONS.items()),
        '',
        'Blocks that are known and refused by all methods that need blocks:',
        '',
        *(f'- `{path}`: {reason}.' for path, reason in REFUSED.items()),
        '',
        "MMPose's Swin, PVT and HRFormer are known by name. A block of your own: [own_backbone.md](own_backbone.md).",
        '',
    ]
    DOC.write_text('\n'.join(text), encoding='utf-8')
    wrong = [row for row in rows if 'wrong' in row]
    print('\n'.join(wrong) or f'{DOC}: {sum(c["yes"] for c in cells.values())} combinations work')
    return int(bool(wrong))


if __name__ == '__main__':
    sys.exit(main())
