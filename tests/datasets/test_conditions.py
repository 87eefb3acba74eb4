import json

import cv2
import numpy as np
import pytest
from PIL import Image

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.conditions import CONDITIONS, degrade, write_conditions


@pytest.fixture
def image():
    """A photograph's kind of image: smooth shapes and some detail."""
    rng = np.random.default_rng(0)
    smooth = cv2.resize(rng.uniform(60, 200, size=(8, 8, 3)), (96, 80), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + rng.normal(0, 12, size=smooth.shape), 0, 255).astype(np.uint8)


def detail(image):
    return np.abs(np.diff(image.astype(float), axis=1)).mean()


@pytest.mark.parametrize('seed', range(5))
def test_what_a_condition_does(image, seed):
    found = {name: degrade(image, name, np.random.default_rng(seed)) for name in CONDITIONS}
    assert all(each.shape == image.shape and each.dtype == np.uint8 for each in found.values())
    np.testing.assert_array_equal(found['clear'], image)
    assert detail(found['blurred']) < 0.5 * detail(image)
    assert abs(found['blurred'].mean() - image.mean()) < 3
    deviation = np.std(found['noisy'].astype(float) - image)
    assert 0.1 * 255 < deviation < 0.26 * 255
    assert 0.1 * image.mean() < found['dark'].mean() < 0.4 * image.mean()
    # Fog is light and takes contrast.
    assert found['foggy'].astype(float).std() < 0.75 * image.std() and found['foggy'].mean() > image.mean()


@pytest.mark.parametrize('condition', CONDITIONS)
def test_grey_images(image, condition):
    grey = degrade(image[..., 0], condition, np.random.default_rng(0))
    assert grey.shape == image.shape[:2] and grey.dtype == np.uint8


def test_an_unknown_condition(image):
    with pytest.raises(ValueError, match="condition must be one of clear, blurred, .*, got 'rain'"):
        degrade(image, 'rain', np.random.default_rng(0))


@pytest.fixture
def folder(tmp_path, image):
    source = tmp_path / 'set'
    for index in range(30):
        (source / 'images' / f'{index % 2}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(source / 'images' / f'{index % 2}' / f'{index}.png')
    (source / 'annotations').mkdir()
    Image.fromarray(image[..., 0]).save(source / 'annotations' / '0.png')
    (source / 'annotations' / 'boxes.json').write_text('{}')
    return source


def test_a_set_under_conditions(folder, image, tmp_path):
    found = write_conditions(folder, tmp_path / 'other')
    assert {*found.values()} == {*CONDITIONS} and len(found) == 30
    assert json.loads((tmp_path / 'other' / 'conditions.json').read_text()) == found
    for name, condition in found.items():
        written = np.asarray(Image.open(tmp_path / 'other' / name))
        assert np.array_equal(written, image) == (condition == 'clear')
        if condition == 'dark':
            assert written.mean() < 0.45 * image.mean()
    for name in ('annotations/0.png', 'annotations/boxes.json'):
        assert (tmp_path / 'other' / name).read_bytes() == (folder / name).read_bytes()
    assert len({(tmp_path / 'other' / name).read_bytes() for name, what in found.items() if what == 'noisy'}) > 1


def test_seeds(folder, tmp_path):
    def bytes_of(path):
        return {p.relative_to(path): p.read_bytes() for p in path.rglob('*.png')}

    first = write_conditions(folder, tmp_path / 'first')
    assert write_conditions(folder, tmp_path / 'again') == first
    assert bytes_of(tmp_path / 'first') == bytes_of(tmp_path / 'again')
    assert write_conditions(folder, tmp_path / 'other', seed=1) != first
    # An image's condition does not depend on the others.
    (folder / 'images' / '0' / '0.png').unlink()
    fewer = write_conditions(folder, tmp_path / 'fewer')
    assert fewer.items() <= first.items() and len(fewer) == 29


def test_what_cannot_be_written(folder, tmp_path):
    with pytest.raises(DataError, match='none holds no images'):
        write_conditions(tmp_path / 'none', tmp_path / 'other')
    (folder / 'images' / '1' / '9.png').write_bytes(b'no image')
    with pytest.raises(DataError, match='9.png cannot be read as an image of 8 bits'):
        write_conditions(folder, tmp_path / 'other')
    assert [p.name for p in tmp_path.iterdir()] == ['set']
