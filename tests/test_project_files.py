"""The files by which people take part are what their readers expect, and agree with each other."""

import re

import pytest
import yaml
from conftest import ROOT

from iconformer_mm import __version__

FORMS = sorted((ROOT / '.github' / 'ISSUE_TEMPLATE').glob('*_*.yml'))
FIELDS = {'input', 'textarea', 'dropdown', 'checkboxes'}
GUIDES = [ROOT / name for name in ('CONTRIBUTING.md', 'CHANGELOG.md', 'SECURITY.md', 'CODE_OF_CONDUCT.md')]


def load(path):
    return yaml.safe_load(path.read_text(encoding='utf-8'))


@pytest.mark.parametrize('path', FORMS, ids=lambda path: path.name)
def test_issue_forms(path):
    form = load(path)
    assert set(form) == {'name', 'description', 'labels', 'body'} and form['labels']
    fields = [part for part in form['body'] if part['type'] != 'markdown']
    for part in fields:
        assert part['type'] in FIELDS and part['attributes']['label']
        if part['type'] in ('dropdown', 'checkboxes'):
            assert part['attributes']['options']
    ids = [part['id'] for part in fields]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r'[a-z_-]+', name) for name in ids)
    assert any(part.get('validations', {}).get('required') for part in fields)


def test_there_is_a_form_for_bugs_and_one_for_wishes():
    assert [path.stem for path in FORMS] == ['bug_report', 'feature_request']
    assert load(FORMS[0].with_name('config.yml')) == {'blank_issues_enabled': True}


def test_citation():
    citation = load(ROOT / 'CITATION.cff')
    assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)
    assert str(citation['version']) == __version__ and citation['license'] == 'Apache-2.0'
    (paper,) = citation['references']
    (collection,) = load(ROOT / 'model-index.yml')['Collections']
    assert (paper['title'], paper['url']) == (collection['Paper']['Title'], collection['Paper']['URL'])
    assert all(author['family-names'] for author in paper['authors'])


def test_changelog_begins_with_this_version():
    headings = re.findall(r'^## \[(.+)\] - (\S+)$', (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), re.MULTILINE)
    assert headings[0][0] == __version__
    assert all(date == 'unreleased' or re.fullmatch(r'\d{4}-\d\d-\d\d', date) for _, date in headings)


def test_commits_are_checked_by_the_tested_releases():
    pinned = dict(
        line.split('==')
        for line in (ROOT / 'requirements' / 'constraints.txt').read_text(encoding='utf-8').splitlines()
        if '==' in line
    )
    repositories = {entry['repo']: entry for entry in load(ROOT / '.pre-commit-config.yaml')['repos']}
    ruff = repositories['https://github.com/astral-sh/ruff-pre-commit']
    assert ruff['rev'] == f'v{pinned["ruff"]}'
    assert [hook['id'] for hook in repositories['local']['hooks']] == ['mypy']


@pytest.mark.parametrize('path', GUIDES, ids=lambda path: path.name)
def test_what_the_guides_name_is_there(path):
    text = path.read_text(encoding='utf-8')
    for link in re.findall(r'\]\(((?!http)[^)#]+)\)', text):
        assert (ROOT / link).exists(), link
    for name in re.findall(r'\b(?:tools|tests|configs|benchmarks|iconformer_mm|docs)/[\w/]+\.\w+', text):
        assert 'NAME' in name or (ROOT / name).exists(), name
