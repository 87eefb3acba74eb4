"""A page about a comparison, from the ``--out`` folder of ``tools/compare.py``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from iconformer_mm.comparison.results import result_files
from iconformer_mm.comparison.tables import PICTURES, RANKS
from iconformer_mm.extras import require_extra

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
    'peak_memory': 'peak memory (MiB)',
    'rank': 'rank',
    'scores': 'scores',
}


def report_comparison(folder: Path) -> Page:
    """Build the page of a comparison.

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
            f'{path} is not a result of tools/compare.py ({type(error).__name__}: {error}); write it again with '
            '`python tools/compare.py COMPARISON --report-only --out FOLDER`'
        ) from None
    finished, problems = read_runs(folder)
    versions: dict[str, set[str]] = {}
    for run in finished.values():
        for package, version in run.get('versions', {}).items():
            versions.setdefault(package, set()).add(version)
    settings = '\n'.join(f'{name}: {json.dumps(run.get("settings"))}' for name, run in finished.items())
    sections = [
        _markdown_section('Summary', folder / 'table.md'),
        *_differences(folder / 'differences.md'),
        *_picture('Ranks', folder / RANKS, 'average ranks; a bar joins methods that do not differ'),
        _plots(folder),
        *_picture('Predictions', folder / PICTURES, 'predictions of the first seed of each method'),
        Section('Runs', notes=problems, tables=[runs]),
        _markdown_section('Search of learning rates', folder / 'search.md'),
        Section('Environment', facts={package: ', '.join(sorted(found)) for package, found in versions.items()}),
        Section('Settings', folded={f'what determined each of {len(finished)} runs': settings} if finished else {}),
    ]
    for section in sections[-2:]:
        if not finished:
            section.notes.append('no finished runs were found in the folder `runs`')
    return Page(title, f'comparison in {folder}, {len(finished)} finished runs', sections)


def _run_row(row: Mapping[str, Any]) -> list[str]:
    formats: dict[str, Callable[[Any], str]] = {
        'backbone_share': '{:.2%}'.format,
        'train_seconds': '{:.0f}'.format,
        'peak_memory': lambda peak: '-' if peak is None else f'{peak / 2**20:,.0f}',
        'scores': lambda scores: ', '.join(map(format_value, scores)),
    }
    # Earlier releases did not measure memory.
    row = {'peak_memory': None, **row}
    return [formats.get(key, format_value)(row[key]) for key in RUN_COLUMNS]


def read_runs(folder: Path) -> tuple[dict[str, dict], list[str]]:
    """Read the finished runs of a comparison.

    Args:
        folder: The comparison's folder.

    Returns:
        The contents by run name, and messages about files that could not be read.
    """
    finished, problems = {}, []
    for name, path in result_files(folder).items():
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            content = error
        if isinstance(content, dict):
            finished[name] = content
        else:
            problems.append(f'the run {name} cannot be read: {content}')
    return finished, problems


def _plots(folder: Path) -> Section:
    section = Section('Curves', look='plot wide')
    for name, caption in (('tradeoff.png', 'score against trained parameters'), ('curves.png', 'training loss')):
        picture = read_picture(folder / name, caption)
        if picture is None:
            section.notes.append(f'{name} is missing or damaged')
        else:
            section.pictures.append(picture)
    return section


def _differences(path: Path) -> list[Section]:
    """Intervals and paired differences, which earlier releases did not write."""
    return [_markdown_section('Differences', path)] if path.is_file() else []


def _picture(title: str, path: Path, caption: str) -> list[Section]:
    """A section of one picture, which not every comparison has."""
    picture = read_picture(path, caption)
    return [] if picture is None else [Section(title, look='wide', pictures=[picture])]


def _markdown_section(title: str, path: Path) -> Section:
    """Render a Markdown file: tables, headings and bold text. Everything else is shown as plain text."""
    if not path.is_file():
        return Section(title, notes=[f'{path.name} is missing'])
    require_extra('report', 'a report')
    from markdown_it import MarkdownIt

    reader = MarkdownIt('zero').enable(['table', 'heading', 'emphasis'])
    tokens = reader.parse(re.sub(r'\A# .*', '', path.read_text(encoding='utf-8', errors='replace')))
    for token in tokens:
        if token.type.startswith('heading'):
            token.tag = 'h3'
    html = reader.renderer.render(tokens, reader.options, {})
    html = html.replace('<table>', '<div class="scroll" tabindex="0"><table>').replace('</table>', '</table></div>')
    return Section(title, html=html)
