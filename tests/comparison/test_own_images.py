"""A comparison on a folder of images of one's own."""

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import ROOT
from mmpretrain.models import VisionTransformer
from PIL import Image
from safetensors.torch import save_file

from iconformer_mm.cli.compare import main
from iconformer_mm.comparison import spec
from iconformer_mm.comparison.spec import ComparisonError, load_comparison
from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.classification import ImageFolderSplit
from iconformer_mm.datasets.few_shot import choose_images, fingerprint_of
from iconformer_mm.extras import EXTRAS

TEMPLATE = ROOT / 'configs' / 'comparison' / 'my_images.yaml'


def write_images(folder, **counts):
    """Noise of a colour a class."""
    random = np.random.RandomState(0)
    for index, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            values = random.randint(0, 128, (20, 20, 3), np.uint8)
            values[..., index % 3] += 127
            Image.fromarray(values).save(folder / name / f'{number}.png')
    return folder


def write_yaml(path, **task):
    content = yaml.safe_load(TEMPLATE.read_text())
    content['tasks']['images'] |= task
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A stand-in for the base that is fetched: its shapes, other values."""
    model = VisionTransformer('dinov2-small', img_size=518, patch_size=14, layer_scale_init_value=1e-5)
    file = tmp_path / 'base.safetensors'
    save_file(model.state_dict(), file)
    monkeypatch.setattr(spec, 'fetch_base', lambda target: file)


def test_one_command(tmp_path, base, monkeypatch, capfd):
    """Copy the template, name a folder, run it: a table, differences, and a page."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / 'my_images', dark=7, green=6, red=5)
    content = yaml.safe_load(TEMPLATE.read_text())
    content['seeds'] = [0]
    options = {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2, 'param_scheduler': None}
    content['tasks']['images'] |= dict(size=28, learning_rates=[1e-3, 1e-2], options=options)
    content['methods'] = {name: content['methods'][name] for name in ('frozen', 'icon')}
    content['methods']['frozen']['learning_rates'] = {'images': [1e-3]}
    path = tmp_path / 'mine.yaml'
    path.write_text(yaml.safe_dump(content))
    main([str(path), '--out', 'out', '--jobs', '2'])
    assert 'open it in a browser' in capfd.readouterr().out
    page = (tmp_path / 'out' / 'report.html').read_text()
    for title in ('Summary', 'Differences', 'Search of learning rates'):
        assert title in page
    differences = (tmp_path / 'out' / 'differences.md').read_text()
    assert '| iCoN | 1 |' in differences and '| frozen backbone | 1 |' in differences
    runs = tmp_path / 'out' / 'runs' / 'images'
    sizes = {}
    for file in runs.glob('*/*.json'):
        run = json.loads(file.read_text())
        assert run['frozen_weights_checked'] and run['peak_memory'] > 0
        sizes[file.stem] = len(run['images']['numerators'])
    # Of the smallest class of 5, two are for training and one for validation. The rest of each is for testing.
    assert sizes == {'seed0': 4 + 3 + 2, 'search_lr0.001': 3, 'search_lr0.01': 3}

    # An image changes, and what is finished counts no more.
    shutil.copy(tmp_path / 'my_images' / 'red' / '0.png', tmp_path / 'my_images' / 'red' / '9.png')
    (tmp_path / 'my_images' / 'red' / '0.png').unlink()
    main([str(path), '--out', 'out', '--report-only'])
    output = capfd.readouterr().out
    assert 'images/icon/search_lr0.001 was finished with another options' in output and '4 runs are left' in output


def test_splits_do_not_overlap(tmp_path):
    folder = write_images(tmp_path / 'set', a=70, b=60)
    comparison = load_comparison(write_yaml(tmp_path / 'c.yaml', images=str(folder), shots=30, val=10, test=15))
    task = comparison.tasks['images']
    options = task.options
    assert options['model.head.num_classes'] == 2 and task.title == 'images (%)'
    found = {}
    for loader in ('train', 'val', 'test'):
        prefix = f'{loader}_dataloader.dataset.'
        kwargs = {key.removeprefix(prefix): value for key, value in options.items() if key.startswith(prefix)}
        del kwargs['type'], kwargs['pipeline.1.scale']
        found[loader] = dataset_of(**kwargs)
        found['search'] = dataset_of(**{**kwargs, 'split': task.search_options['val_dataloader.dataset.split']})
    names = {key: {item['img_path'] for item in dataset} for key, dataset in found.items()}
    assert names['val'] == names['test'] and not names['train'] & names['test']
    assert not names['search'] & (names['train'] | names['test'])
    assert [len(names[key]) for key in ('train', 'search', 'test')] == [60, 20, 30]
    assert all(item['img_path'].split('/')[-2] == 'ab'[item['gt_label']] for item in found['train'])
    assert found['train'].metainfo['classes'] == ('a', 'b')


def dataset_of(**kwargs):
    return ImageFolderSplit(pipeline=[], **kwargs)


def test_a_data_set_knows_its_images(tmp_path):
    folder = write_images(tmp_path / 'set', a=5, b=5)
    known = fingerprint_of(choose_images(folder, shots=2, val=1))
    kwargs = dict(data_root=str(folder), shots=2, val=1, fingerprint=known)
    assert len(dataset_of(**kwargs)) == 4
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test', got 'tests'"):
        dataset_of(**kwargs, split='tests')
    Image.new('RGB', (20, 20)).save(folder / 'a' / '0.png')
    with pytest.raises(DataError, match='set were added, removed or changed since'):
        dataset_of(**kwargs)


@pytest.mark.parametrize(
    ('task', 'message'),
    [
        (dict(images='none'), 'tasks.images: the folder .*none does not exist'),
        (dict(images='one'), 'one has 1 folders; it needs one for each class, two at least'),
        (dict(images='few'), r'few: every class needs more than 2 images .* too few in b \(1\): add images'),
        (dict(images='set', shots=6), r'every class needs more than 7 images \(6 to train, 1 to validate'),
        (dict(images='set', shots=0), 'shots must be at least 1, it is 0'),
        (dict(images='set', test=0), 'test must be at least 1, it is 0'),
        (dict(images='set', size=100), 'size must be a multiple of 14 pixels, from 28 on, it is 100'),
        (dict(images='set', size='84'), "size must be int, it is '84'"),
        (dict(images=['set']), r"images must be str, it is \['set'\]"),
        (dict(images='set', base='base.pth'), 'there are both images and base'),
        (dict(images='set', shot=4), r"unknown key 'shot' in tasks.images \(did you mean 'shots'"),
        (dict(images='set', options=[1]), 'tasks.images.options must be a dictionary'),
        (dict(images='copies'), 'the same picture is in two splits or two classes, .*a/5.png and .*b/copy.png'),
        (dict(images='formats'), r'new.HEIC has a format that is not read, .* convert'),
    ],
)
def test_what_is_wrong(task, message, tmp_path):
    write_images(tmp_path / 'one', a=5)
    write_images(tmp_path / 'few', a=5, b=1)
    write_images(tmp_path / 'set', a=7, b=7)
    copies = write_images(tmp_path / 'copies', a=7, b=7)
    shutil.copy(copies / 'a' / '5.png', copies / 'b' / 'copy.png')
    (write_images(tmp_path / 'formats', a=7, b=7) / 'a' / 'new.HEIC').write_text('')
    with pytest.raises(ComparisonError, match=message):
        load_comparison(write_yaml(tmp_path / 'c.yaml', **task))


def test_a_damaged_test_image_ends_the_command_before_the_first_run(tmp_path, base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_images(tmp_path / 'my_images', a=6, b=6)
    choose_images(folder)['test']['b'][0].write_bytes(b'no image')
    shutil.copy(TEMPLATE, tmp_path)
    with pytest.raises(SystemExit, match=r'error in the data: images cannot be read: .*my_images/b/\d.png'):
        main([TEMPLATE.name, '--out', 'out', '--tasks', 'images'])
    assert not list((tmp_path / 'out').rglob('*.json'))


def test_without_the_extra_of_the_page(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(EXTRAS, 'report', ('no_such_package',))
    write_images(tmp_path / 'my_images', a=5, b=5)
    shutil.copy(TEMPLATE, tmp_path)
    main([TEMPLATE.name, '--out', 'out', '--report-only'])
    assert "report.html needs no_such_package, which is not installed; install the extra 'report'" in unwrapped(capfd)
    assert (tmp_path / 'out' / 'table.md').is_file() and not (tmp_path / 'out' / 'report.html').exists()


def unwrapped(capfd):
    return ' '.join(capfd.readouterr().out.split())
