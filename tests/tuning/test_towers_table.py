"""The table of models, towers and methods: its numbers, and a part of what it says that holds."""

import pytest
import towers_table
from conftest import ROOT, not_with_the_originals
from tower_models import MODELS, need_transformers
from towers_table import METHODS

NAMES, KINDS = list(MODELS), list(METHODS)


@pytest.mark.parametrize('name', NAMES)
@not_with_the_originals  # whose models have other widths here and there
def test_the_page_is_up_to_date(name):
    """Numbers are those of the models of full size; verdicts are those of :func:`refusals`."""
    need_transformers(name)
    rows = towers_table.rows_of(name, dict.fromkeys(METHODS, {}))
    page = (ROOT / 'docs' / 'towers_table.md').read_text(encoding='utf-8').splitlines()
    assert [row for row in rows if row not in page] == [], 'run `python tests/towers_table.py`'


@pytest.mark.parametrize(
    ('name', 'method'),
    [(name, kind) for i, name in enumerate(NAMES) for j, kind in enumerate(KINDS) if (i + j) % 5 == 0],
)
def test_every_fifth_pair(name, method):
    """All pairs take minutes: the script checks them when the page is written."""
    need_transformers(name)
    found = towers_table.check(name, method)
    assert not any('wrong' in verdict for verdict in found.values()), found
    assert 'yes' in found.values()
