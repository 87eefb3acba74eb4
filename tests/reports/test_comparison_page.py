"""The page of a comparison, on a real one."""

import json
import shutil

import pytest
from conftest import ROOT

from iconformer_mm.reports.comparison_page import report_comparison
from iconformer_mm.reports.report_page import ReportError, render_page

RESULTS = ROOT / 'benchmarks' / 'results'
PEFT = RESULTS / 'peft'


@pytest.mark.parametrize('folder', [PEFT, RESULTS / 'real'], ids=lambda folder: folder.name)
def test_numbers_are_those_of_the_files(folder):
    page = report_comparison(folder)
    results = json.loads((folder / 'results.json').read_text())
    sections = {section.title: section for section in page.sections}
    assert page.title == results['title'] and not any(section.notes for section in page.sections)
    (table,) = sections['Runs'].tables
    for row, cells in zip(results['rows'], table.rows, strict=True):
        shown = dict(zip(table.titles, cells))
        assert (shown['method'], shown['task']) == (row['method'], row['task'])
        assert float(shown['mean']) == pytest.approx(row['mean'], rel=1e-5)
        assert float(shown['learning rate']) == row['learning_rate']
        assert int(shown['trained parameters'].replace(',', '')) == row['trained_parameters']
        peak = row.get('peak_memory')  # in bytes; None of runs of earlier releases
        assert shown['peak memory (MiB)'] == ('-' if peak is None else f'{round(peak / 2**20):,d}')
    # Every cell of the Markdown tables, in order.
    files = {'Summary': 'table.md', 'Differences': 'differences.md', 'Search of learning rates': 'search.md'}
    for title, name in files.items():
        assert (title in sections) == (folder / name).is_file()
        place = 0
        for line in (folder / name).read_text().splitlines() if title in sections else ():
            if line.startswith('|') and '---' not in line:
                for cell in line.strip('|').split('|'):
                    place = sections[title].html.index(cell.strip(' *'), place)
    assert ('Ranks' in sections) == (folder / 'ranks.png').is_file()
    assert [picture.kind for picture in sections['Curves'].pictures] == ['png', 'png']
    runs = len(list(folder.glob('runs/*/*/*.json')))
    assert f'{runs} finished runs' in page.subtitle and 'torch' in sections['Environment'].facts


def test_what_is_missing_or_damaged_is_said(tmp_path):
    shutil.copy(PEFT / 'results.json', tmp_path)
    (tmp_path / 'curves.png').write_bytes((PEFT / 'curves.png').read_bytes()[:5000])
    (tmp_path / 'table.md').write_text('<script>1</script> ![x](http://x/y.png)\n\n| a |\n|---|\n| <b>**2**</b> |\n')
    (tmp_path / 'runs' / 'task' / 'a').mkdir(parents=True)
    (tmp_path / 'runs' / 'task' / 'a' / 'seed0.json').write_text('{"settings": ')
    page = report_comparison(tmp_path)
    notes = [note for section in page.sections for note in section.notes]
    assert notes[:2] == ['tradeoff.png is missing or damaged', 'curves.png is missing or damaged']
    assert notes[2].startswith('the run task/a/seed0 cannot be read') and notes[3] == 'search.md is missing'
    text = render_page(page)
    assert '<script' not in text and '<img' not in text and '<strong>2</strong>' in text


@pytest.mark.parametrize('content', ['', '{"title": 1}', '[]', '{"title": "t", "rows": [{}]}'])
def test_damaged_results_are_an_error(tmp_path, content):
    (tmp_path / 'results.json').write_text(content)
    with pytest.raises(ReportError, match='is not a result of tools/compare.py'):
        report_comparison(tmp_path)


def test_a_picture_of_predictions_has_a_section(tmp_path):
    for name in ('results.json', 'table.md', 'search.md', 'tradeoff.png', 'curves.png'):
        shutil.copy(PEFT / name, tmp_path)
    assert 'Predictions' not in [section.title for section in report_comparison(tmp_path).sections]
    shutil.copy(PEFT / 'curves.png', tmp_path / 'predictions.png')
    (section,) = [section for section in report_comparison(tmp_path).sections if section.title == 'Predictions']
    assert len(section.pictures) == 1 and 'plot' not in section.look  # whose colours turn in the dark
