"""Small objects with alpha and backgrounds, in place of the photographs: nothing is downloaded in tests."""

import numpy as np
from PIL import Image

# One pure colour a category, so that every pixel says whose it is.
COLOURS = {'leaf': (0, 255, 0), 'sea': (0, 0, 255), 'wine': (255, 0, 0)}
CATEGORIES = tuple(COLOURS)


def write_sources(root, objects=6, backgrounds=6):
    """Write ``cutouts/CATEGORY/*.png`` and grey ``backgrounds/*.png``; return both folders."""
    rows, columns = np.mgrid[-1:1:48j, -1:1:48j]
    for name, colour in COLOURS.items():
        (root / 'cutouts' / name).mkdir(parents=True)
        for index in range(objects):
            pixels = np.zeros((48, 48, 4), np.uint8)
            pixels[..., :3] = colour
            inside = (np.abs(rows) ** (1 + index) + np.abs(columns) ** (1 + index)) < 0.8
            pixels[..., 3] = 255 * inside
            Image.fromarray(pixels).save(root / 'cutouts' / name / f'{chr(97 + index)}{index}.png')
    (root / 'backgrounds').mkdir()
    for index in range(backgrounds):
        grey = np.random.default_rng(index).integers(60, 200, size=(90, 120), dtype=np.uint8)
        Image.fromarray(grey).convert('RGB').save(root / 'backgrounds' / f'{index}.png')
    return root / 'cutouts', root / 'backgrounds'
