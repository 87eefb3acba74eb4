"""What is known of a comparison, from the ``--out`` folder of ``tools/compare.py``, as a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markupsafe import Markup

from .report_page import Page, ReportError, Section, Table, format_value, read_picture

RUN_COLUMNS = {
    'method': 'method',
    'task': 'task',
    'mean': 'mean',
    'std': 'std',
    'seeds': 'seeds',
    'diverged': 'diverged',
    'learning_rate': 'learning rate',
    'trained_parameters': 'trained parameters',
    'backbone_share': 'backbone share',
    'train_seconds': 'seconds',
    'rank': 'rank',
    'scores': 'scores',
}


def report_comparison(folder: Path) -> Page:
    """The page of a comparison.

    Args:
        folder: ``--out`` folder of ``tools/compare.py``.

    Raises:
        ReportError: Its ``results.json`` cannot be read.
    """
    path = folder / 'results.json'
    try:
        results = json.loads(path.read_text(encoding='utf-8'))
        runs = Table(list(RUN_COLUMNS.values()), [_run_row(row) for row in results['rows']])
        title = str(results['title'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(
            f'{path} is no result of tools/compare.py ({type(error).__name__}: {error}); write it anew with '
            '`python tools/compare.py COMPARISON --report-only --out FOLDER`'
        ) from None
    cells, problems = read_cells(folder / 'cells')
    versions: dict[str, set[str]] = {}
    for cell in cells.values():
        for package, version in cell.get('versions', {}).items():
            versions.setdefault(package, set()).add(version)
    settings = '\n'.join(f'{name}: {json.dumps(cell.get("settings"))}' for name, cell in cells.items())
    sections = [
        _markdown_section('Summary', folder / 'table.md'),
        _plots(folder),
        Section('Runs', notes=problems, tables=[runs]),
        _markdown_section('Search of learning rates', folder / 'search.md'),
        Section('Environment', facts={package: ', '.join(sorted(found)) for package, found in versions.items()}),
        Section('Settings', folded={f'what determined each of {len(cells)} runs': settings} if cells else {}),
    ]
    for section in sections[-2:]:
        if not cells:
            section.notes.append('no finished runs were found in the folder `cells`')
    return Page(title, f'comparison in {folder}, {len(cells)} finished runs', sections)


def _run_row(row: Mapping[str, Any]) -> list[str]:
    formats: dict[str, Callable[[Any], str]] = {
        'backbone_share': '{:.2%}'.format,
        'train_seconds': '{:.0f}'.format,
        'scores': lambda scores: ', '.join(map(format_value, scores)),
    }
    return [formats.get(key, format_value)(row[key]) for key in RUN_COLUMNS]


def read_cells(folder: Path) -> tuple[dict[str, dict], list[str]]:
    """Read the finished runs of a comparison.

    Args:
        folder: The folder ``cells``.

    Returns:
        Their contents by name, and messages on what could not be read.
    """
    cells, problems = {}, []
    for path in sorted(folder.rglob('*.json')):
        name = str(path.relative_to(folder).with_suffix(''))
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            content = error
        if isinstance(content, dict):
            cells[name] = content
        else:
            problems.append(f'the run {name} cannot be read: {content}')
    return cells, problems


def _plots(folder: Path) -> Section:
    section = Section('Curves', look='plot wide')
    for name, caption in (('tradeoff.png', 'score against trained parameters'), ('curves.png', 'training loss')):
        picture = read_picture(folder / name, caption)
        if picture is None:
            section.notes.append(f'{name} is missing or damaged')
        else:
            section.pictures.append(picture)
    return section


def _markdown_section(title: str, path: Path) -> Section:
    """The tables of a Markdown file; only tables, headings and bold text are known, the rest is shown as text."""
    if not path.is_file():
        return Section(title, notes=[f'{path.name} is missing'])
    reader = MarkdownIt('zero').enable(['table', 'heading', 'emphasis'])
    tokens = reader.parse(re.sub(r'\A# .*', '', path.read_text(encoding='utf-8', errors='replace')))
    for token in tokens:
        if token.type.startswith('heading'):
            token.tag = 'h3'
    html = reader.renderer.render(tokens, reader.options, {})
    html = html.replace('<table>', '<div class="scroll" tabindex="0"><table>').replace('</table>', '</table></div>')
    return Section(title, html=Markup(html))
