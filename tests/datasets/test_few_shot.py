import gzip
import hashlib
import os
import zipfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from commands import programs
from PIL import Image

from iconformer_mm.datasets import few_shot
from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.few_shot import (
    FASHION_MNIST,
    choose_images,
    fingerprint_of,
    image_files,
    refuse_damaged,
    split_folder,
    write_fashion_mnist,
)
from iconformer_mm.fetching import FetchError, Wheel


def folder(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new('RGB', (4, 4), (index, 0, 0)).save(root / name / f'{index}.png')
        (root / name / 'notes.txt').write_text('no image')
    return root


def test_a_part_for_validation(tmp_path):
    source = folder(tmp_path / 'all', cat=9, dog=7)
    split_folder(source, tmp_path / 'few', shots=3, most=2, val=3)
    for name, rest in (('cat', 2), ('dog', 1)):
        train, val, test = (names(tmp_path / 'few' / split / name) for split in ('train', 'val', 'test'))
        assert len(train) == len(val) == 3 and len(test) == rest and len(train | val | test) == 6 + rest
    with pytest.raises(DataError, match=r'more than 7 images \(4 to train, 3 to validate, .* too few in dog \(7\)'):
        split_folder(source, tmp_path / 'other', shots=4, val=3)


def names(path):
    return {p.name for p in path.iterdir()}


def test_a_folder_is_split_without_overlap(tmp_path):
    source = folder(tmp_path / 'all', cat=7, dog=5)
    assert split_folder(source, tmp_path / 'few', shots=3, most=3) == ['cat', 'dog']
    for name, rest in (('cat', 3), ('dog', 2)):
        train, test = names(tmp_path / 'few' / 'train' / name), names(tmp_path / 'few' / 'test' / name)
        assert len(train) == 3 and len(test) == rest and not train & test
    before = names(tmp_path / 'few' / 'train' / 'cat')
    split_folder(source, tmp_path / 'few', shots=3, most=3)
    assert names(tmp_path / 'few' / 'train' / 'cat') == before  # the same seed
    assert len(names(source / 'cat')) == 8  # copied, not moved


@pytest.mark.parametrize(
    ('counts', 'message'),
    [
        (
            dict(cat=3, dog=5),
            r'every class needs more than 3 images .* too few in cat \(3\): shots .* can be 2 at',
        ),
        (dict(cat=1, dog=5), r'too few in cat \(1\): add images, or leave it out'),
        (dict(cat=5), r'has 1 folders; it needs one for each class'),
        (None, 'does not exist'),
    ],
)
def test_what_cannot_be_split(counts, message, tmp_path):
    source = tmp_path / 'all' if counts is None else folder(tmp_path / 'all', **counts)
    with pytest.raises(DataError, match=message):
        split_folder(source, tmp_path / 'few', shots=3)
    assert not (tmp_path / 'few').exists()


@pytest.mark.parametrize(('smallest', 'shots'), [(40, 20), (24, 19), (5, 4), (2, 1)])
def test_small_classes_leave_one_of_five_to_test(smallest, shots, tmp_path):
    source = folder(tmp_path / 'all', cat=41, dog=smallest)
    split_folder(source, tmp_path / 'few', shots=None)
    assert {len(names(tmp_path / 'few' / 'train' / name)) for name in ('cat', 'dog')} == {shots}
    assert len(names(tmp_path / 'few' / 'test' / 'dog')) == smallest - shots


def found(chosen):
    return {split: {name: len(images) for name, images in classes.items()} for split, classes in chosen.items()}


@pytest.mark.parametrize(('smallest', 'train', 'val', 'test'), [(130, 20, 20, 90), (50, 20, 10, 20), (3, 1, 1, 1)])
def test_how_many_of_each_by_default(smallest, train, val, test, tmp_path):
    source = folder(tmp_path / 'all', cat=200, dog=smallest)
    chosen = choose_images(source)
    assert found(chosen) == {
        'train': dict(cat=train, dog=train),
        'val': dict(cat=val, dog=val),
        'test': dict(cat=100, dog=test),
    }
    everything = [path for classes in chosen.values() for images in classes.values() for path in images]
    assert len(set(everything)) == len(everything)


def test_splits_are_kept(tmp_path):
    for split, counts in (('train', dict(cat=9, dog=6)), ('test', dict(cat=2, dog=3))):
        folder(tmp_path / 'all' / split, **counts)
    chosen = choose_images(tmp_path / 'all')
    assert found(chosen) == dict(train=dict(cat=8, dog=5), val=dict(cat=1, dog=1), test=dict(cat=2, dog=3))
    assert all(path.parts[-3] == ('test' if split == 'test' else 'train') for split, path in paths_of(chosen))
    folder(tmp_path / 'all' / 'val', cat=4, dog=4)
    chosen = choose_images(tmp_path / 'all', shots=7, most=2)
    assert found(chosen) == dict(train=dict(cat=7, dog=6), val=dict(cat=4, dog=4), test=dict(cat=2, dog=2))
    assert all(path.parts[-3] == split for split, path in paths_of(chosen))
    assert split_folder(tmp_path / 'all', tmp_path / 'few', shots=None) == ['cat', 'dog']
    assert len(names(tmp_path / 'few' / 'train' / 'dog')) == 6 and not (tmp_path / 'few' / 'val').exists()


def paths_of(chosen):
    return [(split, path) for split, classes in chosen.items() for images in classes.values() for path in images]


def test_splits_that_do_not_fit(tmp_path):
    folder(tmp_path / 'all' / 'train', cat=2, dog=2)
    folder(tmp_path / 'all' / 'test', cat=2, cow=2)
    with pytest.raises(DataError, match='train and test differ in the class cow; both need all classes'):
        choose_images(tmp_path / 'all')
    folder(tmp_path / 'other' / 'train', cat=2, dog=1)
    folder(tmp_path / 'other' / 'test', cat=2, dog=2)
    with pytest.raises(DataError, match='the class dog has no image for the split train; add some'):
        choose_images(tmp_path / 'other')
    with pytest.raises(DataError, match='name the folder whose sub-folders are the classes'):
        choose_images(tmp_path)


def test_a_part_of_another_name_is_not_passed_over(tmp_path):
    for split in ('train', 'valid', 'test'):
        folder(tmp_path / split, cat=3, dog=3)
    with pytest.raises(DataError, match='has the parts test, train, valid, and valid would not be used; rename it'):
        choose_images(tmp_path)


def test_an_image_that_changes_is_noticed_in_a_format_of_one_size(tmp_path):
    for path in (tmp_path / 'cat' / '0.bmp', tmp_path / 'dog' / '0.bmp'):
        path.parent.mkdir()
        Image.new('RGB', (4, 4)).save(path)
        os.utime(path, (0, 0))  # two writes may fall into one tick of the clock
    chosen = {'train': {path.parent.name: [path] for path in tmp_path.glob('*/*')}}
    known, (path, *_) = fingerprint_of(chosen), chosen['train']['cat']
    before = path.stat()
    Image.new('RGB', (4, 4), (9, 9, 9)).save(path)
    assert path.stat().st_size == before.st_size and fingerprint_of(chosen) != known


def test_images_in_folders_of_a_class_are_not_passed_over(tmp_path):
    source = folder(tmp_path / 'all', cat=5, dog=5)
    (source / 'cat' / 'notes').mkdir()
    (source / 'cat' / 'notes' / 'a.txt').write_text('no image')
    choose_images(source)
    folder(source / 'cat' / 'more', kittens=1)
    with pytest.raises(DataError, match='cat/more has images, and would not be used; images lie in the folder of th'):
        choose_images(source)


@pytest.mark.parametrize(
    'damage',
    [
        lambda path: path.write_bytes(b''),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),  # OpenCV reads it, and fills it up
        lambda path: path.write_text('<html>404</html>'),
    ],
)
def test_damaged_images_are_found_in_any_split(damage, tmp_path):
    noise = np.random.RandomState(0).randint(0, 256, (32, 32, 3), np.uint8)
    for name, number in product(('cat', 'dog'), range(5)):
        path = tmp_path / 'all' / name / f'{number}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise).save(path)
    refuse_damaged(choose_images(tmp_path / 'all'))
    for split in ('train', 'val', 'test'):
        chosen = choose_images(tmp_path / 'all')
        path = chosen[split]['dog'][0]
        whole = path.read_bytes()
        damage(path)
        with pytest.raises(DataError, match=rf'images cannot be read: {path} \(.+\); repair them, or take them out'):
            refuse_damaged(chosen)
        with pytest.raises(DataError, match='images cannot be read'):
            split_folder(tmp_path / 'all', tmp_path / 'few', shots=2, val=1)
        assert not (tmp_path / 'few').exists()
        path.write_bytes(whole)


def test_classes_may_be_called_as_splits_are(tmp_path):
    chosen = choose_images(folder(tmp_path / 'all', train=5, test=5, car=5))
    assert found(chosen)['train'] == dict(car=2, test=2, train=2)


def test_hidden_files_are_no_images(tmp_path):
    source = folder(tmp_path / 'all', cat=5, dog=5)
    (source / 'cat' / '._0.png').write_text('of another system')
    assert len(image_files(source / 'cat')) == 5


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, '>u4').tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def fashion(tmp_path):
    random = np.random.RandomState(0)
    for name in ('train', 't10k'):
        write_idx(tmp_path / f'{name}-images-idx3-ubyte.gz', random.randint(0, 255, (60, 28, 28), np.uint8))
        write_idx(tmp_path / f'{name}-labels-idx1-ubyte.gz', np.arange(60, dtype=np.uint8) % 10)
    return tmp_path


def test_fashion_mnist(fashion, tmp_path):
    assert write_fashion_mnist(fashion, tmp_path / 'few', shots=2, most=3) == sorted(FASHION_MNIST)
    assert len(list((tmp_path / 'few' / 'train').glob('*/*.png'))) == 20
    assert len(list((tmp_path / 'few' / 'test').glob('*/*.png'))) == 30
    data = gzip.decompress((fashion / 't10k-images-idx3-ubyte.gz').read_bytes())
    third = np.frombuffer(data[16:], np.uint8).reshape(60, 28, 28)[13]  # the second of class 3, dress
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'few' / 'test' / 'dress' / '00013.png')), third)


def test_damaged_fashion_mnist(fashion, tmp_path):
    path = fashion / 'train-images-idx3-ubyte.gz'
    whole = path.read_bytes()
    for content in (whole[:-100], b'', gzip.compress(gzip.decompress(whole)[:-5])):
        path.write_bytes(content)
        with pytest.raises(DataError, match='train-images-idx3-ubyte.gz is damaged'):
            write_fashion_mnist(fashion, tmp_path / 'few')
    path.unlink()
    with pytest.raises(DataError, match='does not exist'):
        write_fashion_mnist(fashion, tmp_path / 'few')


def test_fetching_fashion_mnist(tmp_path, monkeypatch):
    """By apt-get, from which another package is refused; and only once."""
    monkeypatch.setattr(few_shot, 'PACKAGE_FOLDER', Path('usr/fashion'))
    cache = tmp_path / 'cache'
    extract = 'mkdir -p usr/fashion; touch usr/fashion/t10k-labels-idx1-ubyte.gz'
    programs(tmp_path / 'bin', monkeypatch, apt_get='printf abc > a.deb', dpkg_deb=extract)
    with pytest.raises(FetchError, match=r'a.deb .* has the SHA-256 ba7816bf.*, expected 39e172fe.*Nothing of it'):
        few_shot.find_fashion_mnist(cache)
    assert not list(cache.iterdir())
    found = replace(few_shot.PACKAGE, sha256=hashlib.sha256(b'abc').hexdigest())
    monkeypatch.setattr(few_shot, 'PACKAGE', found)
    assert few_shot.find_fashion_mnist(cache) == cache / 'fashion-mnist'
    assert [p.name for p in (cache / 'fashion-mnist').iterdir()] == ['t10k-labels-idx1-ubyte.gz']
    programs(tmp_path / 'without', monkeypatch, apt_get='exit 100')
    assert few_shot.find_fashion_mnist(cache) == cache / 'fashion-mnist'
    with pytest.raises(FetchError, match='cannot be fetched by `apt-get download dataset-.* --data FOLDER'):
        few_shot.find_fashion_mnist(tmp_path / 'other')


def test_fetching_the_textile_defects(tmp_path, monkeypatch):
    """From a wheel, whose code is not unpacked; and only once."""
    path = tmp_path / few_shot.TEXTILE.file
    with zipfile.ZipFile(path, 'w') as wheel:
        wheel.writestr('conformal_clip_data/__init__.py', 'raise SystemExit')
        for name in ('nominal/a.jpg', 'nominal/b.jpg', 'local/c.jpg', 'global/d.jpg', 'other/e.jpg'):
            wheel.writestr(f'{few_shot.TEXTILE_FOLDER}/{name}', name)
    monkeypatch.setattr(Wheel, 'download', lambda self, folder: path)
    found = few_shot.find_textile(tmp_path / 'cache')
    assert {p.relative_to(found).as_posix(): p.read_text() for p in found.glob('*/*')} == {
        'sound/a.jpg': 'nominal/a.jpg',
        'sound/b.jpg': 'nominal/b.jpg',
        'local defect/c.jpg': 'local/c.jpg',
        'global defect/d.jpg': 'global/d.jpg',
    }
    path.unlink()
    assert few_shot.find_textile(tmp_path / 'cache') == found
    assert [p.name for p in (tmp_path / 'cache').iterdir()] == ['textile']


def test_a_package_that_cannot_be_had(tmp_path):
    with pytest.raises(FetchError, match='pip could not download conformal-clip-data==0.1.4 .*a Python package index'):
        few_shot.find_textile(tmp_path)  # nothing is fetched in tests: PIP_NO_INDEX is set
    assert not list(tmp_path.iterdir())


def test_digits(tmp_path):
    """Every image is one of scikit-learn's, enlarged, and in one split only."""
    assert few_shot.write_digits(tmp_path / 'digits', shots=3, most=100, val=2) == [str(n) for n in range(10)]
    images, labels = few_shot.read_digits()
    seen = set()
    for split, number in (('train', {3}), ('val', {2}), ('test', range(87, 93))):
        for label in range(10):
            paths = list((tmp_path / 'digits' / split / str(label)).iterdir())
            assert len(paths) in number
            for path in paths:
                index = int(path.stem)
                assert labels[index] == label and index not in seen
                seen.add(index)
    small = np.asarray(Image.open(tmp_path / 'digits/train/0' / min(names(tmp_path / 'digits/train/0'))).resize((8, 8)))
    index = int(min(names(tmp_path / 'digits/train/0'))[:-4])
    assert np.corrcoef(small.ravel(), images[index].ravel())[0, 1] > 0.95
    with pytest.raises(DataError, match='87 images a class that are not for testing; 80 to train and 8 to validate'):
        few_shot.write_digits(tmp_path / 'more', shots=80, val=8)
    assert not (tmp_path / 'more').exists()


def test_a_mixture(tmp_path):
    for name, classes in (('pets', ('cat', 'dog')), ('shapes', ('cat', 'box'))):
        for split, count in (('train', 2), ('val', 1), ('test', 1)):
            folder(tmp_path / name / split, **dict.fromkeys(classes, count))
    sources = {'pets': tmp_path / 'pets', 'shapes': tmp_path / 'shapes'}
    classes = ['pets cat', 'pets dog', 'shapes box', 'shapes cat']
    assert few_shot.write_mixture(sources, tmp_path / 'mixture') == classes
    for split, count in (('train', 2), ('val', 1), ('test', 1)):
        assert names(tmp_path / 'mixture' / split) == set(classes)
        assert {len(list((tmp_path / 'mixture' / split / c).glob('*.png'))) for c in classes} == {count}
    (tmp_path / 'shapes/test/box').rename(tmp_path / 'shapes/test/bix')
    with pytest.raises(DataError, match='classes of train and test differ in shapes bix, shapes box'):
        few_shot.write_mixture(sources, tmp_path / 'mixture')
    with pytest.raises(DataError, match='two sets of images at least, got pets'):
        few_shot.write_mixture({'pets': tmp_path / 'pets'}, tmp_path / 'mixture')
