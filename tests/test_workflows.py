"""The workflows are ones that GitHub takes, and safe; what they call is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, not_with_the_originals

FOLDER = ROOT / '.github' / 'workflows'
WORKFLOWS = sorted(FOLDER.glob('*.yml'))
pytestmark = not_with_the_originals
NAMES = ['docs', 'lint', 'nightly', 'release', 'tests']


def check_schema(*paths):
    command = [sys.executable, '-m', 'check_jsonschema', '--builtin-schema', 'vendor.github-workflows']
    return subprocess.run([*command, *paths], capture_output=True, text=True)


def audit(path):
    """zizmor's findings on what could be misused: injected code, too many rights, actions that can change."""
    command = [Path(sys.executable).with_name('zizmor'), '--offline', '--no-progress', path]
    return subprocess.run(command, capture_output=True, text=True)


def test_all_are_there():
    assert [path.stem for path in WORKFLOWS] == NAMES


def test_they_follow_the_schema():
    result = check_schema(*WORKFLOWS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_they_are_safe():
    result = audit(FOLDER)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ('wrong', 'check'),
    [
        ('jobs: { a: { runs-on: ubuntu-24.04, steps: [{ runs: ls }] } }', check_schema),
        ('jobs: { a: { runs-on: ubuntu-24.04, steps: [{ uses: actions/checkout@v4 }] } }', audit),
    ],
)
def test_mistakes_are_found(wrong, check, tmp_path):
    path = tmp_path / '.github' / 'workflows' / 'wrong.yml'
    path.parent.mkdir(parents=True)
    path.write_text(f'on: push\npermissions: {{}}\n{wrong}\n')
    assert check(path).returncode != 0


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.stem)
def test_what_they_call_is_there(path):
    jobs = yaml.safe_load(path.read_text(encoding='utf-8'))['jobs']
    commands = '\n'.join(step.get('run', '') for job in jobs.values() for step in job['steps'])
    for name in re.findall(r'\b(?:tools|tests|requirements)/[\w/]+\.\w+', commands):
        assert (ROOT / name).is_file(), name
    assert not re.search(r'\$\{\{', commands)  # values come by the environment, so they are no code


def test_the_tested_pythons_are_those_of_the_classifiers():
    matrix = yaml.safe_load((FOLDER / 'tests.yml').read_text(encoding='utf-8'))['jobs']['one-library']['strategy']
    classifiers = re.findall(r'Python :: (3\.\d+)"', (ROOT / 'pyproject.toml').read_text(encoding='utf-8'))
    assert matrix['matrix']['python'] == classifiers and len(classifiers) == 4


def test_actions_of_the_release_are_proposed_anew():
    """Actions are pinned by commit: something has to propose newer commits."""
    updates = yaml.safe_load((ROOT / '.github' / 'dependabot.yml').read_text(encoding='utf-8'))['updates']
    assert [entry['package-ecosystem'] for entry in updates] == ['github-actions']
