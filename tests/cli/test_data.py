import shutil
from collections import namedtuple

import pytest
from small_cutouts import CATEGORIES, write_sources

from iconformer_mm import extras
from iconformer_mm.cli import data

FEW = ['--shots', '2', '--val', '1', '--test', '1', '--images', '2', '1', '1', '--size', '64', '64']


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    cutouts, backgrounds = write_sources(tmp_path_factory.mktemp('own'), objects=3, backgrounds=3)
    return ['--cutouts', str(cutouts), '--backgrounds', str(backgrounds)]


def test_sets_their_conditions_and_sheets(own, tmp_path, capsys):
    out = tmp_path / 'real'
    asked = ['mixture', 'objects-semantic', 'objects-instance', '--of', 'digits', 'objects']
    data.main([*asked, '--out', str(out), *FEW, *own])
    sets = ['digits', 'objects', 'objects-semantic', 'objects-instance', 'mixture']
    both = {*sets, *(f'{name}-conditions' for name in sets)}
    assert {p.name for p in out.iterdir()} == both | {f'{name}.png' for name in both}
    classes = {f'digits {n}' for n in range(10)} | {f'objects {name}' for name in CATEGORIES}
    for mixture in ('mixture', 'mixture-conditions'):
        for split, number in (('train', 2), ('val', 1), ('test', 1)):
            assert {p.name for p in (out / mixture / split).iterdir()} == classes
            assert {len(list(p.iterdir())) for p in (out / mixture / split).iterdir()} == {number}
    assert len(list((out / 'objects-semantic-conditions').rglob('*.png'))) == 4
    for name in sets:
        original = {p.relative_to(out / name) for p in (out / name).rglob('*') if p.is_file()}
        copied = {p.relative_to(out / f'{name}-conditions') for p in (out / f'{name}-conditions').rglob('*')}
        assert original <= copied
    assert f'{out}/mixture-conditions: look at {out}/mixture-conditions.png' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['digits', '--shots', '0'], '--shots must be at least 1, got 0'),
        (['digits', '--images', '3', '0', '1'], '--images must be at least 1 each, got 3 0 1'),
        (['objects', '--size', '20', '90'], '--size must be at least 64 each, got 20 90'),
        (['objects', '--seed', '-1'], '--seed must be at least 0, got -1'),
        (['mixture', '--of', 'digits'], '--of needs two sets at least'),
        (['digit'], "invalid choice: 'digit'"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        data.main([*arguments, '--out', str(tmp_path / 'out')])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def ends_with(*arguments):
    with pytest.raises(SystemExit) as end:
        data.main([str(a) for a in arguments])
    return end.value.code


def test_sources_that_do_not_fit(own, tmp_path):
    """One line each, and nothing is left."""
    cutouts, backgrounds = own[1], own[3]
    one = tmp_path / 'one class'
    shutil.copytree(f'{cutouts}/sea', one / 'sea')
    few = tmp_path / 'one image'
    shutil.copytree(cutouts, few)
    for path in sorted((few / 'sea').iterdir())[1:]:
        path.unlink()
    out = ['--out', tmp_path / 'out', *FEW]
    for folder, message in (
        (one, 'it needs one for each category, two at least'),
        (few, 'too few in sea (1)'),
        (tmp_path / 'none', 'none does not exist'),
    ):
        found = ends_with('objects', '--cutouts', folder, '--backgrounds', backgrounds, *out)
        assert found.startswith('error in the data: ') and message in found and '\n' not in found
    assert 'has 0 images; 3 backgrounds' in ends_with('objects', '--cutouts', cutouts, '--backgrounds', one, *out)
    assert not (tmp_path / 'out').exists() or not list((tmp_path / 'out').iterdir())


def test_packages_and_disks_that_are_missing(own, tmp_path, monkeypatch):
    monkeypatch.setenv('ICONFORMER_MM_CACHE', str(tmp_path / 'cache'))
    out = ['--out', tmp_path / 'out', *FEW]
    assert ends_with('objects', '--packages', tmp_path, *out).startswith(f'error: {tmp_path} holds 0 files tuxpaint')
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(10**9, 10**9, 1000))
    found = ends_with('objects', 'digits', *out, *own)
    assert found.startswith('error: writing digits, objects needs about') and 'of which 0 MB are free' in found
    assert not (tmp_path / 'out').exists()


def test_space_is_reckoned_by_the_options(own, tmp_path, monkeypatch):
    asked = []

    def stop(folder, needed, what):
        asked.append(needed)
        raise SystemExit

    monkeypatch.setattr(data, 'require_space', stop)
    for arguments in (
        ['objects'],
        ['objects', '--size', '448', '448'],
        ['objects', '--test', '240'],
        ['objects', *own],
        ['all'],
    ):
        ends_with(*arguments, '--out', tmp_path / 'out')
    once, large, many, few, everything = asked
    assert 3.4 * once < large < 4 * once and many == 2 * once and few == once / 4
    assert once > 70e6 and everything > 307e6  # what was measured


@pytest.mark.parametrize(
    ('name', 'package', 'extra'), [('digits', 'sklearn', 'quickstart'), ('objects-instance', 'pycocotools', 'det')]
)
def test_without_a_package(name, package, extra, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, 'find_spec', lambda name: None if name == package else name)
    assert f"{package}, which is not installed; install the extra '{extra}'" in ends_with(
        name, '--out', tmp_path / 'out'
    )
    assert not (tmp_path / 'out').exists()
