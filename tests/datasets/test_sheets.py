import numpy as np
import pytest
from PIL import Image
from small_cutouts import CATEGORIES, write_sources

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.objects import split_sources, write_objects
from iconformer_mm.datasets.sheets import (
    CELL,
    TITLE,
    folder_samples,
    instance_samples,
    semantic_samples,
    write_sheet,
)

SAMPLES = {'classification': folder_samples, 'semantic': semantic_samples, 'instance': instance_samples}


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp('sets')
    parts = split_sources(*write_sources(root))
    for form in SAMPLES:
        write_objects(root / form, form, parts, {'train': 3, 'val': 2, 'test': 2}, size=(64, 64))
    return root


@pytest.mark.parametrize('form', SAMPLES)
def test_samples_of_every_form(form, sets, tmp_path):
    samples = list(SAMPLES[form](sets / form, 6))[:6]
    assert len(samples) == 6 and all(image.shape == (64, 64, 3) for _, image in samples)
    named = {word for title, _ in samples for word in title.replace(',', '').split()}
    assert named & {*CATEGORIES} and named <= {*CATEGORIES, 'background', 'train', 'val', 'test'}
    write_sheet(tmp_path / 'sheet.png', samples, columns=4)
    sheet = Image.open(tmp_path / 'sheet.png')
    assert sheet.size == (4 * CELL, 2 * (CELL + TITLE))
    pixels = np.asarray(sheet)
    for index in range(8):  # the last two places are empty
        top, left = index // 4 * (CELL + TITLE), index % 4 * CELL
        assert (pixels[top : top + 100, left : left + 100].std() > 3) == (index < 6)


def test_splits_and_classes_take_turns(sets):
    titles = [title for title, _ in folder_samples(sets / 'classification', 9)][:9]
    assert {*titles} == {f'{split} {name}' for split in ('train', 'val', 'test') for name in CATEGORIES}


def test_nothing_to_show(tmp_path):
    with pytest.raises(DataError, match='there are no samples for'):
        write_sheet(tmp_path / 'sheet.png', folder_samples(tmp_path, 4))
    assert list(tmp_path.iterdir()) == []
