"""One self-contained HTML page: sections of facts, tables, pictures and texts.

The page fetches nothing and runs nothing. It contains its style and its pictures, and its content security policy
forbids everything else.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from iconformer_mm.extras import require_extra

MIB = 2**20
IMAGE_KINDS = {'.png': 'png', '.jpg': 'jpeg', '.jpeg': 'jpeg', '.webp': 'webp'}

STYLE = """
:root { color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --line: #d4d9df; --paper: #fff; --shade: #f4f6f8;
  --note: #8a4600; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa4af; --line: #3a424b; --paper: #14181d; --shade: #1e242b; --note: #f0b060; }
  .plot img { filter: invert(0.92) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(0.8rem, 3vw, 2rem) 3rem; max-width: 72rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0.5rem 0 0; font-size: 1.6rem; line-height: 1.25; }
h2 { margin: 2.2rem 0 0.6rem; padding-bottom: 0.2rem; border-bottom: 1px solid var(--line); font-size: 1.2rem; }
h3 { margin: 1.4rem 0 0.4rem; font-size: 1rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; margin-top: 0.8rem; font-size: 0.9rem; }
a { color: inherit; }
.subtitle, figcaption { margin: 0.2rem 0 0; color: var(--soft); font-size: 0.9rem; }
.note { margin: 0.5rem 0; padding-left: 0.7rem; border-left: 3px solid var(--note); color: var(--note); }
.scroll { overflow-x: auto; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.8rem 0.25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: normal; }
tr > :not(:first-child) { padding-left: 0.4rem; text-align: right; white-space: nowrap; }
thead tr > th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
thead tr > th:not(:first-child) { min-width: 4rem; white-space: normal; }
tbody th { min-width: 5rem; font-weight: 400; overflow-wrap: anywhere; }
.facts th { padding-right: 1.2rem; color: var(--soft); }
.facts td:not(:first-child) { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr)); gap: 1rem; }
.pictures.plot { grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.pictures.wide { grid-template-columns: 100%; }
figure { margin: 0; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; }
.plot img { width: 100%; }
.wide figure { overflow-x: auto; }
.wide img { min-width: 38rem; max-width: none; }
pre { overflow-x: auto; padding: 0.8rem; background: var(--shade); font-size: 0.8rem; }
summary { cursor: pointer; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .scroll, .wide figure, pre { overflow: visible; }
  .wide img { min-width: 0; }
  pre { white-space: pre-wrap; }
  table { font-size: 8pt; }
  tr > :not(:first-child) { white-space: normal; }
  tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>{{ style | safe }}</style>
</head>
<body>
<header>
<h1>{{ page.title }}</h1>
<p class="subtitle">{{ page.subtitle }}</p>
<nav>{% for section in page.sections %}<a href="#{{ section.id }}">{{ section.title }}</a>{% endfor %}</nav>
</header>
{% for section in page.sections %}
<section id="{{ section.id }}">
<h2>{{ section.title }}</h2>
{% for note in section.notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% if section.facts %}
<div class="scroll"><table class="facts"><tbody>
{% for name, value in section.facts.items() %}
<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% for table in section.tables %}
<div class="scroll" tabindex="0"><table>
<thead><tr>{% for title in table.titles %}<th scope="col">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{{ cell }}</th>{% else %}<td>{{ cell }}</td>{% endif %}\
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{{ section.html | safe }}
{% if section.pictures %}
<div class="pictures {{ section.look }}">
{% for picture in section.pictures %}
<figure><img src="{{ picture.uri }}" alt="{{ picture.caption }}">\
{% if picture.captioned %}<figcaption>{{ picture.caption }}</figcaption>{% endif %}</figure>
{% endfor %}
</div>
{% endif %}
{% for name, text in section.folded.items() %}
<details><summary>{{ name }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""


class ReportError(ValueError):
    """A folder holds nothing to report, or nothing readable."""


@dataclass(frozen=True)
class Table:
    """Rows of cells. The first cell of each row names it.

    Attributes:
        titles: Titles of the columns.
        rows: The cells.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture embedded in the page.

    Attributes:
        caption: What it shows. It is also the alternative text.
        content: The bytes of the file.
        kind: Its image type, such as ``'png'`` or ``'svg+xml'``.
        captioned: Whether the caption is shown below the picture. Defaults to False.
    """

    caption: str
    content: bytes
    kind: str
    captioned: bool = False

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f'data:image/{self.kind};base64,{base64.b64encode(self.content).decode()}'


@dataclass
class Section:
    """A part of the page, shown in the order of its attributes.

    Attributes:
        title: Title.
        notes: Messages on what is missing or damaged.
        facts: Values by name.
        tables: Tables.
        html: Trusted HTML.
        pictures: Pictures.
        look: Layout of the pictures: ``''`` (small), ``'plot'``, or ``'plot wide'`` (one per row).
        folded: Long texts by title, initially collapsed.
    """

    title: str
    notes: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    html: str = ''
    pictures: list[Picture] = field(default_factory=list)
    look: str = ''
    folded: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The anchor of the section."""
        return self.title.lower().replace(' ', '-')


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: Title.
        subtitle: A line below it.
        sections: The parts.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]


def format_value(value: Any) -> str:
    """Format a float with six significant digits and an integer with thousands separators. Text is unchanged."""
    if value is None:
        return '–'
    if isinstance(value, float):
        return f'{value:.6g}'
    return f'{value:,}' if type(value) is int else str(value)


def read_picture(path: Path, caption: str, captioned: bool = False) -> Picture | None:
    """Read a picture. Return None if it is damaged.

    Args:
        path: PNG, JPEG or WebP file.
        caption: What the picture shows.
        captioned: Whether the caption is shown. Defaults to False.
    """
    try:
        content = path.read_bytes()
        Image.open(io.BytesIO(content)).load()
    except (OSError, ValueError, SyntaxError):
        return None
    return Picture(caption, content, IMAGE_KINDS[path.suffix.lower()], captioned)


def render_page(page: Page) -> str:
    """Render a page as HTML. All texts are escaped.

    Args:
        page: The page.

    Raises:
        MissingExtraError: Jinja is not installed.
    """
    require_extra('report', 'a report')
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined)
    return environment.from_string(TEMPLATE).render(page=page, style=STYLE)
