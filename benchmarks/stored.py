"""Measure what a forward pass stores for the backward pass, by operator.

    python benchmarks/stored.py --cases upernet-swin-b --methods full icon adaptformer --out work_dirs/stored

A tensor that several operators need is counted once, for the first of them. Parameters are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from measure import Panel, Table, make_parser, prepare, settings_of, write_results
from step import CASES, DEFAULT_METHODS, METHODS, MIB, adapt, build, make_data

SMALL = 0.01  # share of the total; smaller kinds form one row


def nodes_of(loss: Tensor) -> Iterator[Any]:
    """Yield the nodes of the graph of a loss."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [next_node for next_node, _ in node.next_functions]


def saved_by(node: Any) -> Iterator[Tensor]:
    """Yield the tensors that a node stores."""
    if hasattr(node, 'saved_tensors'):
        yield from (t for t in node.saved_tensors if t is not None)
        return
    for name in dir(node):
        if name.startswith('_saved_'):
            value = getattr(node, name)
            yield from (t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, Tensor))


def stored_bytes(model: nn.Module, loss: Tensor) -> Counter[str]:
    """Count the stored bytes by kind of node."""
    counted = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: Counter[str] = Counter()
    for node in nodes_of(loss):
        for tensor in saved_by(node):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in counted:
                counted.add(storage.data_ptr())
                sizes[type(node).__name__.removesuffix('Backward0').removesuffix('Backward')] += storage.nbytes()
    return sizes


def rows_of(found: dict[str, Counter[str]]) -> list[dict[str, Any]]:
    """Make one row of MiB per kind, one column per method. Kinds that are small in all methods form one row."""
    totals = {method: sizes.total() for method, sizes in found.items()}
    large = [
        kind for kind in sum(found.values(), Counter()) if any(s[kind] > SMALL * totals[m] for m, s in found.items())
    ]
    large.sort(key=lambda kind: -max(sizes[kind] for sizes in found.values()))
    rows = {kind: {method: sizes[kind] for method, sizes in found.items()} for kind in large}
    rows['others'] = {m: totals[m] - sum(rows[kind][m] for kind in large) for m in found}
    rows['all'] = totals
    return [{'operator': kind, **{m: size / MIB for m, size in row.items()}} for kind, row in rows.items()]


def main() -> None:
    """Run the benchmark."""
    parser = make_parser(__doc__.partition('\n')[0], 'work_dirs/stored', [*CASES], ['vit-s', 'swin-t'])
    parser.add_argument(
        '--methods', nargs='+', choices=METHODS, default=DEFAULT_METHODS, metavar='METHOD', help=', '.join(METHODS)
    )
    args = parser.parse_args()
    prepare(args)
    tables, panels = [], []
    for name in args.cases:
        case, found = CASES[name], {}
        for method in args.methods:
            model = adapt(build(case, args.device), method).train()
            losses = model(**make_data(model, case, case.batch, training=True), mode='loss')
            loss, _ = model.parse_losses(losses)
            found[method] = stored_bytes(model, loss)
        rows = rows_of(found)
        title = f'{name}, MiB stored'
        tables.append(Table(title, {'operator': '', **dict.fromkeys(found, ',.0f')}, rows))
        series = {m: ([row['operator'] for row in rows], [row[m] for row in rows]) for m in found}
        panels.append(Panel(title, series, 'MiB'))
    write_results(args.out, tables, settings_of(args), panels)


if __name__ == '__main__':
    main()
