"""Check methods on every tower of small models, and write the table in docs/towers_table.md.

python tests/towers_table.py
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from tower_models import MODELS, build, losses, predict, same, stock, train, wake

from iconformer_mm import disabled, inject, load_adapter, merge, remove, save_adapter
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import adapter_shapes
from iconformer_mm.tuning.quantised_weight import named_weights
from iconformer_mm.tuning.selection import Selection

ROOT = Path(__file__).resolve().parent.parent
DOC = ROOT / 'docs' / 'towers_table.md'
# Options for small models, which exact starts and few channels ask for.
METHODS: dict[str, dict] = {
    'icon': dict(bottleneck=4),
    'lora': dict(rank=2),
    'dora': dict(rank=2),
    'bitfit': {},
    'norm': {},
    'ssf': dict(std=0),
    'adaptformer': dict(bottleneck=4),
    'adapter': dict(bottleneck=4),
    'lorand': {},
}
MERGEABLE = ('lora', 'dora', 'bitfit', 'norm', 'ssf')
# Letters for why a method is refused, by words of its error.
REASONS = {
    'g': (
        ('lie on none that is known', 'have no grid', 'the grid of its tokens is unknown'),
        'the tokens lie on no grid that is known, or are words',
    ),
}


def _letter(error: ValueError) -> str:
    return next(
        (letter for letter, (words, _) in REASONS.items() if any(w in str(error) for w in words)), f'wrong: {error}'
    )


def refusals(name: str, model: nn.Module, method: str, small: bool) -> dict[str, str]:
    """The letter of the reason for each tower of a model that refuses a method."""
    found = {}
    for tower in MODELS[name].all_towers:
        options = METHODS[method] if small else {}
        try:
            adapter_shapes(model, dict(type=method, **options), Selection(backbones=(tower,)))
        except ValueError as error:
            found[tower] = _letter(error)
    return found


@lru_cache
def frozen_predictions(name: str) -> list[Tensor]:
    """Those of the frozen model: attention of torch rounds otherwise where its weights need no gradient."""
    model = build(name)
    inject(model, 'frozen', where=MODELS[name].all_towers, freeze=MODELS[name].freeze)
    return predict(name, model)


def check(name: str, method: str) -> dict[str, str]:
    """``'yes'`` for each tower, the letter of the reason for which the method is refused, or ``'wrong: ...'``."""
    model = build(name)
    refused = refusals(name, model, method, small=True)
    where = [tower for tower in MODELS[name].all_towers if tower not in refused]
    fault = _fault(name, model, method, where) if where else ''
    return {t: refused.get(t) or (f'wrong: {fault}' if fault else 'yes') for t in MODELS[name].all_towers}


def _fault(name: str, model: nn.Module, method: str, where: list[str]) -> str:
    """What is wrong with a model whose towers are adapted; empty where nothing is."""
    expected, stock_predictions = frozen_predictions(name), predict(name, model)
    before = {n: v.clone() for n, v in model.state_dict().items()}
    others = [tower for tower in MODELS[name].all_towers if tower not in where]
    methods = [dict(where=where, type=method, **METHODS[method])]
    methods += [dict(where=others, type='frozen')] if others else []
    summary = inject(model, methods=methods, freeze=MODELS[name].freeze)
    if not all(summary.towers[tower].trained for tower in where):
        return 'a tower is not trained'
    if not same(predict(name, model), expected):
        return 'other outputs before training'
    if not all(map(is_adapter, train(name, model, steps=1))):
        return 'more than adapters is trained'
    state = model.state_dict()
    if any(not torch.equal(before[n], state[n]) for n in before):
        return 'frozen values changed'
    wake(model)
    tuned = predict(name, model)
    if same(tuned, expected):
        return 'no effect'
    with disabled(model):
        if not same(predict(name, model), expected):
            return 'other outputs while disabled'
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, f'{folder}/a.safetensors')
        fresh = build(name)
        load_adapter(fresh, f'{folder}/a.safetensors')
        if not same(predict(name, fresh), tuned):
            return 'other outputs from the file'
    if method in MERGEABLE:
        adapted = losses(name, fresh)
        merge(fresh)
        if not torch.allclose(losses(name, fresh), adapted, rtol=1e-4, atol=1e-4):
            return 'other outputs when merged'
    remove(model)
    # DDQ registers branches of its head in the decoder when it is trained, adapted or not.
    if {n for n in model.state_dict() if 'decoder.aux_reg_branches' not in n} != set(before):
        return 'other names when removed'
    return '' if same(predict(name, model), stock_predictions) else 'other outputs when removed'


def _short(number: int) -> str:
    return f'{number / 1e6:.2f} M' if number >= 1e6 else f'{number / 1e3:.0f} k'


@lru_cache
def sizes(name: str) -> dict[str, tuple[int, dict[str, int | str]]]:
    """Of each tower of the model of full size, its parameters, and those that each method trains by default.

    Where a method is refused, the letter of the reason stands for the number.
    """
    model = stock(name)
    found = {}
    for tower in MODELS[name].all_towers:
        if tower == MODELS[name].backbone and not MODELS[name].stock_backbone:
            continue
        trained: dict[str, int | str] = {}
        for method in METHODS:
            try:
                shapes = adapter_shapes(model, method, Selection(backbones=(tower,)))
                trained[method] = sum(shape.numel() for shape in shapes.values())
            except ValueError as error:
                trained[method] = _letter(error)
        found[tower] = sum(p.numel() for _, p in named_weights(model.get_submodule(tower))), trained
    return found


def check_all(name: str) -> dict[str, dict[str, str]]:
    """What :func:`check` finds, by method."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):
        warnings.simplefilter('ignore')
        return {method: check(name, method) for method in METHODS}


def rows_of(name: str, checked: dict[str, dict[str, str]]) -> list[str]:
    """The rows of the table for one model.

    Args:
        name: The model.
        checked: What :func:`check` found, by method. What it does not have is taken to be as in the whole model.
    """
    rows = []
    for tower, (total, trained) in sizes(name).items():
        cells = []
        for method, number in trained.items():
            whole = number if isinstance(number, str) else 'yes'
            small = checked[method].get(tower, whole)
            share = '' if isinstance(number, str) else f'{_short(number)}, {100 * number / total:.2g}%'
            cells.append(
                (share or whole) if small == whole else f'wrong: {small} on the small model, {whole} on the whole one'
            )
        rows.append(f'| {name} | `{tower}` | {_short(total)} | {" | ".join(cells)} |')
    wrong = {f'{tower}: {v}' for each in checked.values() for tower, v in each.items() if 'wrong' in v}
    return rows + [f'wrong: {name}, {text}' for text in sorted(wrong)]


def main() -> int:
    """Write the table; 1 if anything is wrong."""
    rows = [row for name in MODELS for row in rows_of(name, check_all(name))]
    text = [
        '# Models, towers and methods',
        '',
        'Written by `python tests/towers_table.py`, and checked by `tests/tuning/test_towers_table.py`. '
        '[towers.md](towers.md) says how to adapt towers.',
        '',
        "Numbers are the parameters that a method trains in a tower of the library's own model, with its default "
        'options, and their share of the tower.',
        '',
        'A number says that all of this holds on a small model of the kind. Before training the outputs are those of '
        'the frozen model to the last bit (`ssf` with `std=0`). Every trained parameter gets a gradient. Nothing '
        'frozen changes. `disabled` gives the frozen model back. The adapter file gives the same outputs on another '
        'copy. `merge` gives the same losses (' + ', '.join(MERGEABLE) + '). `remove` gives the model back.',
        '',
        '| model | tower | parameters | ' + ' | '.join(METHODS) + ' |',
        '|' + '---|' * (len(METHODS) + 3),
        *rows,
        '',
        'Where a method is refused:',
        '',
        *(f'- `{letter}`: {text}.' for letter, (_, text) in REASONS.items()),
        '',
        'The models of full size:',
        '',
        *(f'- {name}: `{model.stock}`' for name, model in MODELS.items()),
        '',
    ]
    wrong = [row for row in rows if 'wrong' in row]
    if not wrong:
        DOC.write_text('\n'.join(text), encoding='utf-8')
    print('\n'.join(wrong) or f'{DOC}: {len(rows)} towers')
    return int(bool(wrong))


if __name__ == '__main__':
    sys.exit(main())
