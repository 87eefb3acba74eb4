import hashlib
import shutil
from collections import namedtuple
from dataclasses import replace

import pytest
from commands import programs

from iconformer_mm.datasets import photographs
from iconformer_mm.datasets.photographs import (
    BACKGROUNDS,
    CATEGORIES,
    LEFT_OUT,
    WALLPAPERS,
    choose_stamps,
    find_backgrounds,
    find_cutouts,
)
from iconformer_mm.fetching import FetchError
from iconformer_mm.files import DiskFullError

TAKEN = {
    'bird': ['animals/birds/duck.png'],
    'coin': ['symbols/money/us/coins/001penny.png'],
    'fish': ['animals/fish/clownfish.png'],
    'gravestone': ['seasonal/halloween/grave-a.png'],
    'invertebrate': ['animals/fish/lobster.png', 'animals/insects/mantis.png'],
    'mammal': ['animals/mammals/cats/lion.png', 'animals/marsupials/koala.png'],
}
NOT_TAKEN = [
    'animals/birds/duck_mirror.png',
    'animals/birds/duck_flip.png',
    'animals/birds/duck_mirror_flip.png',
    'animals/birds/tux.png',
    'animals/birds/duck.svg',
    'animals/birds/duck.txt',
    'animals/birds/cartoon/robin.png',
    'animals/insects/bee.png',
    'animals/mammals/bears/toys/edward_bear.png',
    'seasonal/halloween/ghost.png',
    'symbols/money/euro/coins/001.png',
    'town/roadsigns/stop.png',
]


def write_stamps(folder):
    for name in [name for names in TAKEN.values() for name in names] + NOT_TAKEN:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_photographs_are_chosen_among_the_stamps(tmp_path):
    chosen = choose_stamps(write_stamps(tmp_path))
    assert list(chosen) == list(CATEGORIES)
    found = {name: [p.relative_to(tmp_path).as_posix() for p in paths] for name, paths in chosen.items() if paths}
    assert found == TAKEN


def test_the_lists():
    """No file is in two categories, and everything left out would be in one."""
    assert WALLPAPERS.keys() == BACKGROUNDS.keys()
    names = [name for files in BACKGROUNDS.values() for name in files]
    assert len({*names}) == len(names) >= 20
    places = [place for all_places in CATEGORIES.values() for place in all_places]
    assert len({*places}) == len(places)
    assert all(any(name.startswith(f'{place}/') for place in places) for name in LEFT_OUT)
    for package in (photographs.STAMPS, *WALLPAPERS.values()):
        assert len(package.sha256) == 64 and package.version and package.size > 1e7


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Packages `abc`, in which dpkg-deb finds the stamps; and the folder they are downloaded to."""
    stamps = write_stamps(tmp_path / 'made' / photographs.STAMPS_FOLDER)
    digest = hashlib.sha256(b'abc').hexdigest()
    monkeypatch.setattr(photographs, 'STAMPS', replace(photographs.STAMPS, sha256=digest))
    files = {'mate-backgrounds': {'a.jpg': 'usr/a.jpg', 'b.jpg': 'usr/b.jpg'}}
    monkeypatch.setattr(photographs, 'BACKGROUNDS', files)
    monkeypatch.setitem(WALLPAPERS, 'mate-backgrounds', replace(WALLPAPERS['mate-backgrounds'], sha256=digest))
    for name in ('a.jpg', 'b.jpg', 'drawing.jpg'):
        (tmp_path / 'made' / 'usr' / name).write_text(name)
    programs(
        tmp_path / 'bin',
        monkeypatch,
        apt_get='printf abc > ${2%%=*}_1_all.deb; echo "$@" >> ' + str(tmp_path / 'asked'),
        dpkg_deb=f'cp -r {tmp_path}/made/usr .',
    )
    assert stamps.is_dir()
    return tmp_path / 'cache'


def test_fetching_cutouts(package, monkeypatch):
    found = find_cutouts(package)
    assert list(package.iterdir()) == [found]
    assert (package.parent / 'asked').read_text() == 'download tuxpaint-stamps-default=2022.06.04-1\n'
    kept = {name: sorted(p.read_text() for p in (found / name).iterdir()) for name in TAKEN}
    assert kept == TAKEN
    assert find_cutouts(package) == found
    assert (package.parent / 'asked').read_text().count('download') == 1  # only once
    monkeypatch.setattr(photographs, 'LEFT_OUT', {*LEFT_OUT, 'animals/birds/duck.png'})
    assert [p.name for p in (find_cutouts(package) / 'bird').iterdir()] == []  # not what other lists took


def test_fetching_backgrounds(package):
    found = find_backgrounds(package)
    assert {p.name: p.read_text() for p in found.iterdir()} == {'a.jpg': 'a.jpg', 'b.jpg': 'b.jpg'}
    assert (package.parent / 'asked').read_text() == 'download mate-backgrounds=1.26.0-1\n'


def test_packages_that_were_downloaded_elsewhere(package, tmp_path):
    folder = tmp_path / 'packages'
    folder.mkdir()
    with pytest.raises(FetchError, match=r'holds 0 files tuxpaint-.*_\*.deb, expected the one of tuxpaint-.* 2022'):
        find_cutouts(package, folder)
    (folder / 'tuxpaint-stamps-default_2_all.deb').write_text('abd')
    with pytest.raises(FetchError, match=r'tuxpaint-stamps-default_2_all.deb .* has the SHA-256 a52d159f.*, expected'):
        find_cutouts(package, folder)
    (folder / 'tuxpaint-stamps-default_2_all.deb').write_text('abc')
    assert find_cutouts(package, folder).is_dir()
    assert [p.name for p in folder.iterdir()] == ['tuxpaint-stamps-default_2_all.deb']  # it stays
    assert [p.name.partition('-')[0] for p in package.iterdir()] == ['cutouts']


def test_no_index(package, tmp_path, monkeypatch):
    programs(tmp_path / 'broken', monkeypatch, apt_get='echo "E: Version \'1.26.0-1\' was not found" >&2; exit 100')
    with pytest.raises(FetchError, match=r'`apt-get download mate-backgrounds=1.26.0-1` \(E: Version .* not found\)'):
        find_backgrounds(package)
    assert list(package.iterdir()) == []


def test_a_package_without_a_listed_file(package, tmp_path):
    """A link is none: it could lead anywhere."""
    (tmp_path / 'made/usr/b.jpg').unlink()
    (tmp_path / 'made/usr/b.jpg').symlink_to('/etc/hostname')
    with pytest.raises(FetchError, match='b.jpg is not a regular file of the package'):
        find_backgrounds(package)
    assert list(package.iterdir()) == []


@pytest.mark.parametrize('find', [find_cutouts, find_backgrounds])
def test_too_little_disk(find, package, monkeypatch):
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage(10**9, 10**9 - 4_200_000, 4_200_000))
    with pytest.raises(DiskFullError, match=r'needs about \d\d\d MB in .*cache, of which 4 MB are free. Free some'):
        find(package)
    assert not package.exists()
