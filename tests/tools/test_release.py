"""A release is built, checked and trained with; what would make a wrong one is said before anything is built."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT, not_with_the_originals

from iconformer_mm import __version__

SCRIPT = ROOT / 'tools' / 'release.sh'
GIT = ('git', '-c', 'user.name=a', '-c', 'user.email=a@example.com', '-c', 'commit.gpgsign=false')
pytestmark = not_with_the_originals


def release(script, *options):
    env = {**os.environ, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
    return subprocess.run(['bash', script, *options], env=env, capture_output=True, text=True)


def test_up_to_the_upload(tmp_path):
    result = release(SCRIPT, '--out', tmp_path / 'dist')
    assert result.returncode == 0, result.stdout + result.stderr
    assert '[release] training with it' in result.stdout and 'uploading' not in result.stdout
    wheel, sdist = sorted((tmp_path / 'dist').iterdir())
    assert wheel.name == f'iconformer_mm-{__version__}-py3-none-any.whl'
    assert sdist.name == f'iconformer_mm-{__version__}.tar.gz'
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f'iconformer_mm-{__version__}.dist-info/METADATA').decode()
        assert 'iconformer_mm/.mim/model-index.yml' in archive.namelist()
    needed = {
        line.split('>')[0] for line in metadata.splitlines() if line.startswith('Requires-Dist') and ';' not in line
    }
    assert needed == {f'Requires-Dist: {name}' for name in ('numpy', 'pillow', 'rich', 'safetensors', 'torch')}
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    folder = f'iconformer_mm-{__version__}'
    assert {f'{folder}/tests/conftest.py', f'{folder}/LICENSE', f'{folder}/CHANGELOG.md'} <= set(names)


@pytest.fixture
def checkout(tmp_path):
    """A repository with what the script looks at before it builds, committed; its script."""
    folder = tmp_path / 'checkout'
    for name in ('tools/release.sh', 'iconformer_mm/version.py', 'CHANGELOG.md'):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / 'CHANGELOG.md').write_text(f'# Changelog\n\n## [{__version__}] - 2026-12-01\n')
    commit(folder, 'init')
    return folder


def commit(folder, *first):
    for command in ([*first], ['add', '--all'], ['commit', '--quiet', '--message', 'Files']):
        if command:
            subprocess.run([*GIT, *command], cwd=folder, check=True, capture_output=True)


def refusal(folder, *options):
    result = release(folder / 'tools' / 'release.sh', *options)
    assert result.returncode == 1 and not result.stdout
    (line,) = result.stderr.splitlines()
    return line


def test_the_changelog_names_another_version(checkout):
    (checkout / 'CHANGELOG.md').write_text('## [9.9.9] - 2026-12-01\n')
    assert refusal(checkout).startswith(
        f'[release] error: CHANGELOG.md begins with 9.9.9, iconformer_mm/version.py has {__version__}'
    )


def test_nothing_uncommitted_is_uploaded(checkout):
    (checkout / 'new.py').touch()
    assert 'error: there are changes that are not committed' in refusal(checkout, '--upload')


def test_nothing_undated_is_uploaded(checkout):
    (checkout / 'CHANGELOG.md').write_text(f'## [{__version__}] - unreleased\n')
    commit(checkout)
    assert f'error: CHANGELOG.md says that {__version__} is unreleased' in refusal(checkout, '--upload')


def test_nothing_untagged_is_uploaded(checkout):
    subprocess.run([*GIT, 'tag', 'v0.0.1'], cwd=checkout, check=True)
    assert f'error: the commit has no tag v{__version__}' in refusal(checkout, '--upload', 'testpypi')


def test_no_checkout(checkout):
    shutil.rmtree(checkout / '.git')
    assert 'is no git checkout' in refusal(checkout)


def test_unknown_option(checkout):
    assert "error: unknown option '--publish'" in refusal(checkout, '--publish')
