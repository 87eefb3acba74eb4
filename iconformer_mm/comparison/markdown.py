"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def to_markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, first column to the left and the others to the right."""
    lines = ['| ' + ' | '.join(titles) + ' |', '|---' + '|---:' * (len(titles) - 1) + '|']
    lines += ['| ' + ' | '.join(row) + ' |' for row in rows]
    return '\n'.join(lines) + '\n'
