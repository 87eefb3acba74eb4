"""Photographed objects with alpha masks, and photographs to put them on, out of Debian packages.

Which files are taken is listed here. The rest of the packages is drawings, rendered pictures and patterns.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from iconformer_mm.fetching import DebianPackage, FetchError, cached_folder
from iconformer_mm.files import require_space

STAMPS = DebianPackage(
    'tuxpaint-stamps-default',  # GPL-2
    '6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34',
    '2022.06.04-1',
    160_880_444,
)
STAMPS_FOLDER = 'usr/share/tuxpaint/stamps'
# Folders of the package, with all below them, by category. `folder/start*` is files of a folder by how they begin.
CATEGORIES = {
    'bird': ('animals/birds',),
    'coin': ('symbols/money/canadian/coins', 'symbols/money/japanese', 'symbols/money/us/coins'),
    'fish': ('animals/fish',),
    'flower': ('plants/flowers',),
    'fruit': ('food/fruit',),
    'gravestone': ('seasonal/halloween/grave*',),
    'instrument': ('hobbies/music',),
    'invertebrate': (
        'animals/insects',
        'animals/shellfish',
        'animals/fish/lobster*',
        'animals/fish/shrimp*',
    ),
    'mammal': ('animals/mammals', 'animals/marsupials'),
    'tool': ('household/tools',),
    'vegetable': ('food/vegetables',),
    'vehicle': ('vehicles', 'military/vehicles'),
}
# Folders of drawings and of copies of nature.
NO_PHOTOGRAPHS = ('cartoon', 'plastic', 'toys')
# Turned copies of another file. A name with `tux` is the mascot's.
_COPY = re.compile(r'_(mirror|flip)|tux', re.IGNORECASE)
LEFT_OUT = {
    # Drawings, silhouettes and rendered pictures.
    'animals/insects/bee.png',
    'animals/insects/fly.png',
    'animals/mammals/echidna.png',
    'animals/mammals/hedgehog.png',
    'vehicles/emergency/sedan_police.png',
    # Of another category than their folder's, or of none.
    'animals/fish/lobster.png',
    'animals/fish/shrimp.png',
    'food/vegetables/mushroom.png',
    'household/tools/cementmixer.png',
    # Parts of a vehicle.
    'vehicles/7spoke256.png',
    'vehicles/wheel_tractor.png',
    # Ships and balloons: too few for a kind that looks like no other vehicle.
    'vehicles/flight/balloon360.png',
    'vehicles/ship/chineseJunk.png',
    'vehicles/ship/walnutBoat.png',
}

WALLPAPERS = {
    'lomiri-wallpapers-16.04': DebianPackage(  # CC-BY-4.0, CC-BY-SA-4.0
        'lomiri-wallpapers-16.04',
        'a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab',
        '20.04.0-2',
        15_783_184,
    ),
    'mate-backgrounds': DebianPackage(  # GPL-2+
        'mate-backgrounds',
        '7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04',
        '1.26.0-1',
        46_638_500,
    ),
    'plasma-workspace-wallpapers': DebianPackage(  # GPL-2+; LGPL-3 in the metadata of each of these photographs
        'plasma-workspace-wallpapers',
        '32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b',
        '4:5.27.5-2',
        94_047_772,
    ),
}
_LOMIRI, _MATE, _PLASMA = 'usr/share/backgrounds', 'usr/share/backgrounds/mate/nature', 'usr/share/wallpapers'
# The photographs that show no object of the categories, by package; the key is the name under which each is kept.
BACKGROUNDS = {
    'lomiri-wallpapers-16.04': {
        'aitzgorri.jpg': f'{_LOMIRI}/aitzgorri_by_Aitzol_Berasategi.jpg',
        'bridge.jpg': f'{_LOMIRI}/Bridge_by_Sander_Klootwijk.jpg',
        'clock.jpg': f'{_LOMIRI}/greentock_by_Peter_Nerlich.jpg',
        'picos.jpg': f'{_LOMIRI}/picosdeeuropa_by_Aitzol_Berasategi.jpg',
        'stream.jpg': f'{_LOMIRI}/life_by_Aitzol_Berasategi.jpg',
        'sunset.jpg': f'{_LOMIRI}/sunset_by_Aitzol_Berasategi.jpg',
    },
    'mate-backgrounds': {
        'aqua.jpg': f'{_MATE}/Aqua.jpg',
        'blinds.jpg': f'{_MATE}/Blinds.jpg',
        'dune.jpg': f'{_MATE}/Dune.jpg',
        'meadow.jpg': f'{_MATE}/GreenMeadow.jpg',
        'raindrops.jpg': f'{_MATE}/RainDrops.jpg',
        'storm.jpg': f'{_MATE}/Storm.jpg',
        'wood.jpg': f'{_MATE}/Wood.jpg',
    },
    'plasma-workspace-wallpapers': {
        'cups.jpg': f'{_PLASMA}/ColorfulCups/contents/images/2560x1600.jpg',
        'dusk.jpg': f'{_PLASMA}/DarkestHour/contents/images/2560x1600.jpg',
        'facade.jpg': f'{_PLASMA}/Grey/contents/images/2560x1600.jpg',
        'forest.jpg': f'{_PLASMA}/Path/contents/images/2560x1600.jpg',
        'jetty.jpg': f'{_PLASMA}/ColdRipple/contents/images/2560x1600.jpg',
        'lake.jpg': f'{_PLASMA}/summer_1am/contents/images/2560x1600.jpg',
        'leaves.jpg': f'{_PLASMA}/FallenLeaf/contents/images/2560x1600.jpg',
        'moss.jpg': f'{_PLASMA}/OneStandsOut/contents/images/2560x1600.jpg',
        'planks.jpg': f'{_PLASMA}/BytheWater/contents/images/2560x1600.jpg',
        'sky.jpg': f'{_PLASMA}/Kite/contents/images/2560x1600.jpg',
    },
}


def choose_stamps(stamps: Path) -> dict[str, list[Path]]:
    """Choose the photographed objects among the stamps.

    Args:
        stamps: The folder ``stamps`` of the package.

    Returns:
        Files by category, sorted.
    """
    return {name: sorted(set(_photographs(stamps, places))) for name, places in CATEGORIES.items()}


def _photographs(stamps: Path, places: Iterable[str]) -> Iterable[Path]:
    for place in places:
        listed = place.endswith('*')  # named file by file, so it is meant
        for path in stamps.glob(f'{place}.png' if listed else f'{place}/**/*.png'):
            name = path.relative_to(stamps)
            drawn = bool({*name.parts} & {*NO_PHOTOGRAPHS}) or _COPY.search(path.name) is not None
            if not drawn and (listed or name.as_posix() not in LEFT_OUT):
                yield path


def find_cutouts(cache: Path, packages: Path | None = None) -> Path:
    """Find the photographed objects in a cache, or fetch them into it: one folder per category, of PNG files.

    They are taken from Debian's package ``tuxpaint-stamps-default`` (GPL-2, 161 MB), which is not installed.

    Args:
        cache: The cache folder.
        packages: Folder with the package, where it was downloaded elsewhere. Defaults to None: download it.

    Returns:
        The folder of the folders.

    Raises:
        FetchError: They are not there and cannot be fetched, or the package is another one.
        DiskFullError: There is too little space.
    """

    def fill(folder: Path) -> Path:
        unpacked, chosen = folder / 'package', folder / 'chosen'
        unpacked.mkdir()
        stamps = STAMPS.unpack(unpacked, packages) / STAMPS_FOLDER
        for name, paths in choose_stamps(stamps).items():
            (chosen / name).mkdir(parents=True)
            for path in paths:
                _take(path, chosen / name / path.relative_to(stamps).as_posix().replace('/', '.'))
        return chosen

    digest = _digest(CATEGORIES, NO_PHOTOGRAPHS, sorted(LEFT_OUT), STAMPS.sha256)
    cutouts = cache / f'cutouts-{digest}'
    if not cutouts.is_dir():  # the package, and what is unpacked of it
        require_space(cache, 2 * STAMPS.size + 50_000_000, STAMPS.name)
    return cached_folder(cutouts, fill)


def find_backgrounds(cache: Path, packages: Path | None = None) -> Path:
    """Find the photographs for backgrounds in a cache, or fetch them into it: one folder of JPEG files.

    They are taken from three Debian packages of wallpapers (157 MB in all), which are not installed.

    Args:
        cache: The cache folder.
        packages: Folder with the packages, where they were downloaded elsewhere. Defaults to None: download them.

    Returns:
        The folder.

    Raises:
        FetchError: They are not there and cannot be fetched, or a package is another one.
        DiskFullError: There is too little space.
    """

    def fill(folder: Path) -> Path:
        chosen = folder / 'chosen'
        chosen.mkdir()
        for name, files in BACKGROUNDS.items():
            unpacked = folder / name
            unpacked.mkdir()
            WALLPAPERS[name].unpack(unpacked, packages)
            for kept, path in files.items():
                _take(unpacked / path, chosen / kept)
            shutil.rmtree(unpacked)
        return chosen

    digest = _digest(BACKGROUNDS, [package.sha256 for package in WALLPAPERS.values()])
    backgrounds = cache / f'backgrounds-{digest}'
    if not backgrounds.is_dir():
        sizes = [package.size for package in WALLPAPERS.values()]
        require_space(cache, 3 * max(sizes) + 50_000_000, 'unpacking wallpapers')
    return cached_folder(backgrounds, fill)


def _digest(*lists: object) -> str:
    """Of what is taken: a cache that was filled by other lists is not used."""
    return hashlib.sha256(repr(lists).encode()).hexdigest()[:8]


def _take(path: Path, target: Path) -> None:
    """Move a file out of a package. A link is refused: it could lead anywhere."""
    if path.is_symlink() or not path.is_file():
        raise FetchError(f'{path.name} is not a regular file of the package, so this is not the expected version')
    os.replace(path, target)
