import json
from importlib import import_module

import cv2
import numpy as np
import pytest
from mmengine.registry import init_default_scope
from PIL import Image
from small_cutouts import CATEGORIES, COLOURS, write_sources

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.objects import (
    SPLITS,
    Composer,
    paste,
    read_background,
    read_cutout,
    split_sources,
    write_objects,
)

SIZE = (96, 112)
NUMBERS = {'train': 6, 'val': 3, 'test': 4}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp('sources'))


@pytest.fixture(scope='module')
def parts(sources):
    return split_sources(*sources)


def files(parts, split):
    part = parts[split]
    return {path for paths in [*part.objects.values(), part.backgrounds] for path in paths}


def test_no_object_and_no_background_is_in_two_splits(sources, parts):
    train, val, test = (files(parts, split) for split in SPLITS)
    assert not train & val and not train & test and not val & test
    assert train | val | test == {path for folder in sources for path in folder.rglob('*.png')}
    for split, number in zip(SPLITS, (3, 1, 2)):
        assert {name: len(paths) for name, paths in parts[split].objects.items()} == dict.fromkeys(CATEGORIES, number)
        assert len(parts[split].backgrounds) == number
    assert {split: files(split_sources(*sources), split) for split in SPLITS} == dict(zip(SPLITS, (train, val, test)))


def test_files_of_one_object_stay_together(tmp_path):
    cutouts, backgrounds = write_sources(tmp_path)
    same = ('a0', 'a0_again', 'a0-2', 'a0_again_3')
    for name in CATEGORIES:
        for copy in same[1:]:
            (cutouts / name / f'{copy}.png').write_bytes((cutouts / name / 'a0.png').read_bytes())
    parts = split_sources(cutouts, backgrounds)
    for name in CATEGORIES:
        stems = [{path.stem for path in parts[split].objects[name]} for split in SPLITS]
        assert sorted(len(found & {*same}) for found in stems) == [0, 0, 4]
        assert all(stems)


@pytest.mark.parametrize(
    ('objects', 'backgrounds', 'message'),
    [
        (2, 6, r'every category needs 3 objects at least.* too few in leaf \(2\), sea \(2\), wine \(2\)'),
        (3, 2, r'backgrounds has 2 images; 3 backgrounds at least'),
    ],
)
def test_too_few(objects, backgrounds, message, tmp_path):
    with pytest.raises(DataError, match=message):
        split_sources(*write_sources(tmp_path, objects, backgrounds))


def test_folders_that_do_not_fit(tmp_path):
    cutouts, backgrounds = write_sources(tmp_path)
    with pytest.raises(DataError, match='none does not exist'):
        split_sources(tmp_path / 'none', backgrounds)
    with pytest.raises(DataError, match='none does not exist'):
        split_sources(cutouts, tmp_path / 'none')
    with pytest.raises(DataError, match='has 0 folders; it needs one for each category, two at least'):
        split_sources(backgrounds, backgrounds)


@pytest.mark.parametrize('place', [(5, 7), (-4, 3), (14, -6), (-9, -9), (16, 20), (40, 0), (0, -30)])
def test_alpha_composition(place):
    """The formula, pixel by pixel: what the object lets through of the background, and its own colour."""
    rng = np.random.default_rng(0)
    background, colour = rng.random((20, 24, 3)), rng.random((12, 10, 3))
    alpha = rng.random((12, 10))
    cutout = np.concatenate([colour * alpha[..., None], alpha[..., None]], axis=2).astype(np.float32)
    image = background.astype(np.float32)
    mask = paste(image, cutout, *place)
    for row in range(20):
        for column in range(24):
            r, c = row - place[0], column - place[1]
            inside = 0 <= r < 12 and 0 <= c < 10
            a = alpha[r, c] if inside else 0
            over = a * colour[r, c] + (1 - a) * background[row, column] if inside else background[row, column]
            np.testing.assert_allclose(image[row, column], over, atol=1e-6)
            assert mask[row, column] == (a >= 0.5)


def test_reading_a_cutout(tmp_path):
    pixels = np.zeros((30, 20, 4), np.uint8)
    pixels[5:17, 4:14] = (200, 100, 50, 255)
    pixels[5, 4] = (200, 100, 50, 51)
    pixels[0, 0] = (255, 255, 255, 20)  # dirt
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    cutout = read_cutout(tmp_path / 'a.png')
    assert cutout.shape == (12, 10, 4)  # to the object
    np.testing.assert_allclose(cutout[3, 3], np.array([200, 100, 50, 255]) / 255, atol=1e-6)
    np.testing.assert_allclose(cutout[0, 0], np.array([200, 100, 50, 255]) / 255 / 5, atol=1e-6)


def test_cutouts_that_are_none(tmp_path):
    path = tmp_path / 'a.png'
    for image, message in (
        (Image.new('RGB', (8, 8)), 'a.png has no alpha channel'),
        (Image.new('RGBA', (8, 8), (9, 9, 9, 255)), 'a.png: its alpha channel is opaque everywhere'),
        (Image.new('RGBA', (8, 8), (9, 9, 9, 0)), 'a.png: its alpha channel is transparent everywhere'),
    ):
        image.save(path)
        with pytest.raises(DataError, match=message):
            read_cutout(path)
    path.write_bytes(path.read_bytes()[:40])
    for read in (read_cutout, read_background):
        with pytest.raises(DataError, match='a.png cannot be read as an image'):
            read(path)


def test_masks_are_the_visible_pixels(parts):
    """Backgrounds are grey and categories pure colours: pixels say themselves whose they are."""
    composer = Composer(parts['train'], SIZE, seed=1)
    hidden = several = 0
    for index in range(25):
        found = composer.several(index)
        covered = np.zeros(SIZE, int)
        for mask, label, area in zip(found.masks, found.labels, found.areas):
            covered += mask
            assert (found.semantic[mask] == label + 1).all()
            assert 0.5 * area <= mask.sum() <= area and mask.sum() >= 12
            hidden += mask.sum() < area
        assert covered.max() <= 1
        np.testing.assert_array_equal(covered > 0, found.semantic > 0)
        several += len(found.masks) > 1
        # At edges alpha is between 0 and 1, and light falls on both.
        edges = np.abs(cv2.Laplacian(found.semantic.astype(np.float32), cv2.CV_32F))
        edges = cv2.dilate(edges, np.ones((7, 7))) > 0
        pixels = found.image.astype(int)
        for value in np.unique(found.semantic):
            region = pixels[(found.semantic == value) & ~edges]
            if value:
                strongest = int(np.argmax(COLOURS[CATEGORIES[value - 1]]))
                others = np.delete(region, strongest, axis=1)
                assert (region[:, strongest] > 100).all() and others.max(initial=0) < 60
            else:
                assert np.ptp(region, axis=1).max(initial=0) < 60
    assert several > 10 and hidden > 3


def test_scale_and_light_change(parts):
    composer = Composer(parts['train'], SIZE)
    found = [composer.single(0, index) for index in range(12)]
    sizes = [image.areas[0] for image in found]
    light = [image.image[image.masks[0]].max(axis=1).mean() for image in found]
    assert max(sizes) > 1.8 * min(sizes) and np.ptp(light) > 30
    for image in found:
        assert image.labels[0] == 0 and all(mask.sum() <= image.areas[0] / 2 for mask in image.masks[1:])
        assert image.masks[0].sum() >= 0.75 * image.areas[0]
    assert {len(image.masks) for image in found} == {1, 2}
    objects = [image.sources[1] for image in found]
    assert objects[:3] == objects[3:6] and len({*objects}) == 3  # they take turns


def test_seeds(parts):
    composer, again = (Composer(parts['test'], SIZE, seed=3, split='test') for _ in range(2))
    np.testing.assert_array_equal(composer.several(4).image, again.several(4).image)
    np.testing.assert_array_equal(composer.single(1, 2).image, again.single(1, 2).image)
    other = Composer(parts['test'], SIZE, seed=4, split='test')
    assert not np.array_equal(composer.several(4).image, other.several(4).image)
    assert not np.array_equal(composer.several(4).image, composer.several(5).image)


def test_instances_in_cocos_format(parts, tmp_path):
    """Read by pycocotools, masks and categories are those that were composed."""
    from pycocotools.coco import COCO

    write_objects(tmp_path / 'coco', 'instance', parts, NUMBERS, SIZE)
    for split in SPLITS:
        coco = COCO(str(tmp_path / 'coco' / 'annotations' / f'instances_{split}2017.json'))
        composer = Composer(parts[split], SIZE, 0, split)
        assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(CATEGORIES)
        assert len(coco.getImgIds()) == NUMBERS[split]
        for index in range(NUMBERS[split]):
            found = composer.several(index)
            annotations = coco.loadAnns(coco.getAnnIds(imgIds=[index]))
            assert [a['category_id'] - 1 for a in annotations] == found.labels
            for annotation, mask in zip(annotations, found.masks):
                np.testing.assert_array_equal(coco.annToMask(annotation), mask)
            image = cv2.imread(str(tmp_path / 'coco' / f'{split}2017' / f'{index:012d}.jpg'))[..., ::-1]
            assert np.abs(image.astype(int) - found.image).mean() < 10  # JPEG


def test_classes_in_ade20ks_format(parts, tmp_path):
    """Label 0 is for no label; 1 is the background."""
    write_objects(tmp_path / 'ade', 'semantic', parts, NUMBERS, SIZE)
    assert (tmp_path / 'ade' / 'classes.txt').read_text().split() == ['background', *CATEGORIES]
    for split, folder in zip(SPLITS, ('training', 'validation', 'testing')):
        composer = Composer(parts[split], SIZE, 0, split)
        for index in range(NUMBERS[split]):
            name = f'{folder}/ADE_{split}_{index:08d}'
            labels = np.asarray(Image.open(tmp_path / 'ade' / 'annotations' / f'{name}.png'))
            np.testing.assert_array_equal(labels, composer.several(index).semantic + 1)
            assert (tmp_path / 'ade' / 'images' / f'{name}.jpg').is_file()


def test_classification(sources, parts, tmp_path):
    write_objects(tmp_path / 'all', 'classification', parts, NUMBERS, SIZE)
    for split, number in NUMBERS.items():
        assert {p.name for p in (tmp_path / 'all' / split).iterdir()} == {*CATEGORIES}
        for name in CATEGORIES:
            assert len(list((tmp_path / 'all' / split / name).glob('*.jpg'))) == number
    noted = json.loads((tmp_path / 'all' / 'sources.json').read_text())
    assert noted.keys() == {f'{split}/{name}' for split in SPLITS for name in CATEGORIES}
    for split in SPLITS:
        allowed = {path.name for path in parts[split].backgrounds}
        for name in CATEGORIES:
            images = noted[f'{split}/{name}']
            assert len(images) == NUMBERS[split]
            assert {image[0] for image in images} <= allowed
            assert {image[1] for image in images} <= {path.name for path in parts[split].objects[name]}


LIBRARIES = {
    'classification': ('mmpretrain', 'CustomDataset', dict(data_prefix='test')),
    'semantic': (
        'mmseg',
        'BaseSegDataset',
        dict(
            data_prefix=dict(img_path='images/testing', seg_map_path='annotations/testing'),
            metainfo=dict(classes=('background', *CATEGORIES), palette=[[index] * 3 for index in range(4)]),
            reduce_zero_label=True,
        ),
    ),
    'instance': (
        'mmdet',
        'CocoDataset',
        dict(
            ann_file='annotations/instances_test2017.json',
            data_prefix=dict(img='test2017/'),
            metainfo=dict(classes=CATEGORIES),
            test_mode=True,
        ),
    ),
}


@pytest.mark.parametrize('form', LIBRARIES)
def test_the_libraries_read_them(form, parts, tmp_path):
    """By the classes that docs/real_images.md names."""
    library, kind, settings = LIBRARIES[form]
    write_objects(tmp_path, form, parts, NUMBERS, SIZE)
    init_default_scope(library)
    datasets = import_module(f'{library}.registry').DATASETS
    dataset = datasets.build(dict(type=kind, data_root=str(tmp_path), **settings, pipeline=[]))
    composer = Composer(parts['test'], SIZE, 0, 'test')
    if form == 'classification':
        assert len(dataset) == 3 * NUMBERS['test'] and tuple(dataset.CLASSES) == CATEGORIES
        return
    assert len(dataset) == NUMBERS['test']
    for index in range(len(dataset)):
        found, sample = composer.several(index), dataset.get_data_info(index)
        if form == 'instance':
            assert [each['bbox_label'] for each in sample['instances']] == found.labels
        else:
            loaded = import_module('mmseg.datasets').LoadAnnotations()({**sample, 'ori_shape': SIZE})
            np.testing.assert_array_equal(loaded['gt_seg_map'], found.semantic)


def test_fewer_images_are_the_first_of_more(parts, tmp_path):
    for name, number in (('few', 2), ('many', 5)):
        write_objects(tmp_path / name, 'semantic', parts, dict.fromkeys(SPLITS, number), SIZE)
    few = sorted(p.relative_to(tmp_path / 'few') for p in (tmp_path / 'few').rglob('ADE*'))
    assert len(few) == 12
    for path in few:
        assert (tmp_path / 'few' / path).read_bytes() == (tmp_path / 'many' / path).read_bytes()


def test_a_set_is_whole_or_not_there(tmp_path):
    sources = write_sources(tmp_path / 'sources')
    out = tmp_path / 'out' / 'objects'
    parts = split_sources(*sources)
    write_objects(out, 'classification', parts, NUMBERS, SIZE)
    before = {path: path.read_bytes() for path in out.rglob('*') if path.is_file()}
    parts['test'].backgrounds[0].write_bytes(b'no image')  # read last
    with pytest.raises(DataError, match='cannot be read as an image'):
        write_objects(out, 'classification', parts, dict.fromkeys(SPLITS, 1), SIZE)
    assert {path: path.read_bytes() for path in out.rglob('*') if path.is_file()} == before
    assert [path.name for path in out.parent.iterdir()] == ['objects']


def test_arguments_that_cannot_be(parts, tmp_path):
    for form, numbers, size, message in (
        ('depth', NUMBERS, SIZE, "form must be one of classification, semantic, instance, got 'depth'"),
        ('semantic', {'train': 0}, SIZE, 'one image a split'),
        ('semantic', NUMBERS, (32, 96), '64 pixels a side'),
    ):
        with pytest.raises(ValueError, match=message):
            write_objects(tmp_path / 'out', form, parts, numbers, size)
