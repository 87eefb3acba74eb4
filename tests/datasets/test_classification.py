import hashlib

import numpy as np
import pytest
from mmpretrain.registry import DATASETS
from scipy.io import savemat

import iconformer_mm  # noqa: F401


def svhn_file(folder, split='train', n=12, **changes):
    rng = np.random.default_rng(0)
    content = dict(
        X=rng.integers(0, 256, size=(32, 32, 3, n), dtype=np.uint8),
        y=(np.arange(n) % 10 + 1).astype(np.uint8)[:, None],
    )
    content.update(changes)
    savemat(folder / f'{split}_32x32.mat', content)
    return content


def build(**cfg):
    return DATASETS.build(dict(cfg))


def test_svhn_reads_the_official_layout(tmp_path):
    content = svhn_file(tmp_path)
    dataset = build(type='SVHN', data_root=str(tmp_path), split='train')
    assert len(dataset) == 12 and len(dataset.CLASSES) == 10
    for index in range(12):
        item = dataset[index]
        np.testing.assert_array_equal(item['img'], content['X'][..., index])
        # Class 10 of the file is the digit 0.
        assert dataset.CLASSES[item['gt_label']] == str(content['y'][index, 0])[-1]


def test_svhn_missing_file(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r'SVHN file .*train_32x32.mat is missing; get it from http.*download=True'
    ):
        build(type='SVHN', data_root=str(tmp_path))


def test_svhn_damaged_and_foreign_files(tmp_path):
    path = tmp_path / 'train_32x32.mat'
    svhn_file(tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(RuntimeError, match='train_32x32.mat cannot be read as an SVHN file'):
        build(type='SVHN', data_root=str(tmp_path))
    svhn_file(tmp_path, X=np.zeros((28, 28, 3, 12), np.uint8))
    with pytest.raises(RuntimeError, match=r'X is \(28, 28, 3, 12\) with 12 labels, expected \(32, 32, 3, n\)'):
        build(type='SVHN', data_root=str(tmp_path))
    svhn_file(tmp_path, y=np.arange(12)[:, None])
    with pytest.raises(RuntimeError, match='labels are not all within 1 to 10'):
        build(type='SVHN', data_root=str(tmp_path))
    with pytest.raises(ValueError, match="split must be one of train, test, extra, got 'val'"):
        build(type='SVHN', data_root=str(tmp_path), split='val')


def test_svhn_download_is_checked(tmp_path, monkeypatch):
    from iconformer_mm.datasets.classification import svhn

    source = tmp_path / 'server'
    source.mkdir()
    svhn_file(source)
    data = (source / 'train_32x32.mat').read_bytes()
    asked = []

    def download(url, root, filename, md5):
        asked.append((url, md5))
        (tmp_path / filename).write_bytes(data)

    monkeypatch.setattr(svhn, 'download_url', download)
    monkeypatch.setitem(svhn.SVHN.md5, 'train', hashlib.md5(data).hexdigest())
    for _ in range(2):  # the second time the file is there, and whole
        assert len(build(type='SVHN', data_root=str(tmp_path), download=True)) == 12
    assert asked == [('http://ufldl.stanford.edu/housenumbers/train_32x32.mat', hashlib.md5(data).hexdigest())]


def test_digits_split():
    splits = {s: build(type='Digits', split=s, num_per_class=20) for s in ('train', 'val', 'test')}
    assert {s: len(d) for s, d in splits.items()} == dict(train=200, val=697, test=900)
    for split, dataset in splits.items():
        counts = np.bincount([dataset[i]['gt_label'] for i in range(len(dataset))])
        assert counts.max() - counts.min() <= {'train': 0, 'val': 6, 'test': 5}[split]
    images = [d[i]['img'].tobytes() for d in splits.values() for i in range(len(d))]
    assert len(images) == 1797 and len(set(images)) > 1790  # all of them, once each
    first = splits['train'][0]['img']
    assert first.dtype == np.uint8 and first.shape == (8, 8) and first.max() == 255


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = load_digits()
    known = {np.round(i * 255 / 16).astype(np.uint8).tobytes(): t for i, t in zip(digits.images, digits.target)}
    dataset = build(type='Digits', split='test')
    assert all(known[dataset[i]['img'].tobytes()] == dataset[i]['gt_label'] for i in range(900))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(split='all'), "split must be 'train', 'val' or 'test', got 'all'"),
        (dict(split='val'), "split='val' needs num_per_class"),
        (dict(num_per_class=100), 'num_per_class must be from 1 to'),
        (dict(num_per_class=0), 'num_per_class must be from 1 to'),
    ],
)
def test_digits_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        build(type='Digits', **options)


def test_strokes_are_seeded():
    def data(**options):
        dataset = build(type='Strokes', num_images=60, num_classes=6, **options)
        return np.stack([dataset[i]['img'] for i in range(60)]), [dataset[i]['gt_label'] for i in range(60)]

    images, labels = data()
    again, labels_again = data()
    np.testing.assert_array_equal(images, again)
    assert labels == labels_again and np.bincount(labels).tolist() == [10] * 6
    assert images.shape == (60, 28, 28) and images.dtype == np.uint8
    assert images.reshape(60, -1).max(axis=1).min() > 40  # nothing is blank
    for other in (dict(seed=1), dict(split='test')):
        assert not np.array_equal(images, data(**other)[0])
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        data(split='val')


def test_strokes_of_a_class_are_alike():
    """A nearest-mean classifier on the pixels is far above chance, and far from perfect."""
    train = build(type='Strokes', num_images=400, num_classes=8)
    test = build(type='Strokes', num_images=200, num_classes=8, split='test')
    x, y = (
        (np.stack([train[i]['img'] for i in range(400)]) / 255).reshape(400, -1),
        [train[i]['gt_label'] for i in range(400)],
    )
    means = np.stack([x[np.array(y) == k].mean(axis=0) for k in range(8)])
    hits = [
        np.square(means - test[i]['img'].reshape(-1) / 255).sum(axis=1).argmin() == test[i]['gt_label']
        for i in range(200)
    ]
    assert 0.3 < np.mean(hits) < 0.99
