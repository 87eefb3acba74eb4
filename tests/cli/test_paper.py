"""The benchmarks of the paper's scale, from archives of the published formats to the table."""

import json
import pickle
import re
import shutil
import tarfile
import zipfile
from types import SimpleNamespace

import cv2
import h5py
import numpy as np
import pytest
from benchmark_runs import PYRAMID
from commands import ranks, scalars, tool
from conftest import ROOT
from mmdet.datasets import CocoDataset
from mmpretrain.datasets import CIFAR100
from scipy.io import savemat

from iconformer_mm.cli import paper
from iconformer_mm.cli import test as cli_test
from iconformer_mm.cli import train as cli_train
from iconformer_mm.comparison.paper import TASKS, models_of
from iconformer_mm.datasets.published import PUBLISHED
from iconformer_mm.datasets.scenes import WRITERS, scenes


def pack(archive, folder):
    """Pack what a folder holds, and remove it."""
    if archive.suffix == '.zip':
        with zipfile.ZipFile(archive, 'w') as content:
            for path in sorted(folder.rglob('*')):
                content.write(path, path.relative_to(folder))
    else:
        with tarfile.open(archive, 'w:gz') as content:
            for path in sorted(folder.iterdir()):
                content.add(path, path.name)
    shutil.rmtree(folder)


def write_archives(out):
    """Small data in each of the published formats."""
    rng = np.random.default_rng(0)
    out.mkdir()
    for split in ('train', 'test'):
        images = rng.integers(0, 256, (32, 32, 3, 8), dtype=np.uint8)
        savemat(out / f'{split}_32x32.mat', dict(X=images, y=(np.arange(8) % 10 + 1).astype(np.uint8)[:, None]))

    cifar = out / 'new' / 'cifar-100-python'
    cifar.mkdir(parents=True)
    for split in ('train', 'test'):
        data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        (cifar / split).write_bytes(pickle.dumps(dict(data=data, fine_labels=[0, 1, 2, 3])))
    (cifar / 'meta').write_bytes(pickle.dumps(dict(fine_label_names=['a', 'b', 'c', 'd'])))
    pack(out / 'cifar-100-python.tar.gz', out / 'new')

    food = out / 'new' / 'food-101'
    (food / 'images' / 'pizza').mkdir(parents=True)
    (food / 'meta').mkdir()
    for split, numbers in (('train', (0, 1)), ('test', (2, 3))):
        for number in numbers:
            image = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            cv2.imwrite(str(food / 'images' / 'pizza' / f'{number}.jpg'), image)
        (food / 'meta' / f'{split}.txt').write_text(''.join(f'pizza/{number}\n' for number in numbers))
    pack(out / 'food-101.tar.gz', out / 'new')

    for split in ('train', 'val'):
        WRITERS['coco'](out / 'coco', split, scenes(4 if split == 'train' else 2, 0, size=(96, 128)))
        WRITERS['ade20k'](out / 'new' / 'ADEChallengeData2016', split, scenes(2, 0, size=(96, 128)))
        path = out / 'coco' / 'annotations' / f'instances_{split}2017.json'
        content = json.loads(path.read_text())
        # All classes of COCO; the shapes of the scenes are its first ones.
        names = CocoDataset.METAINFO['classes']
        content['categories'] = [dict(id=index, name=name) for index, name in enumerate(names, 1)]
        path.write_text(json.dumps(content))
    pack(out / 'ADEChallengeData2016.zip', out / 'new')
    for part, archive in (
        ('train2017', 'train2017'),
        ('val2017', 'val2017'),
        ('annotations', 'annotations_trainval2017'),
    ):
        shutil.copytree(out / 'coco' / part, out / 'new' / part)
        pack(out / f'{archive}.zip', out / 'new')
    shutil.rmtree(out / 'coco')

    with h5py.File(out / 'nyu_depth_v2_labeled.mat', 'w') as file:
        file['images'] = rng.integers(0, 256, (4, 3, 640, 480), dtype=np.uint8)
        file['depths'] = rng.uniform(1, 9, (4, 640, 480)).astype(np.float32)
        file['names/kitchen'] = np.array([[ord(letter)] for letter in 'kitchen'], np.uint16)
        kinds = file.create_dataset('sceneTypes', (1, 4), dtype=h5py.ref_dtype)
        kinds[0] = [file['names/kitchen'].ref] * 4
    savemat(out / 'splits.mat', dict(trainNdxs=np.array([[1], [3]]), testNdxs=np.array([[2], [4]])))
    return out


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    return write_archives(tmp_path_factory.mktemp('published') / 'downloads')


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(paper, 'fetch_weights', lambda run, weights: None)


@pytest.fixture(scope='module')
def prepared(archives, tmp_path_factory):
    data = tmp_path_factory.mktemp('data')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, 'fetch_weights', lambda run, weights: None)
        paper.main(['prepare', '--methods', 'icon', '--data-root', str(data), '--archives', str(archives)])
    return data


def test_prepare_takes_every_published_format(prepared, archives, no_weights):
    for published in PUBLISHED.values():
        assert published.missing(prepared) == []
    with zipfile.ZipFile(archives / 'val2017.zip') as packed:
        for name in packed.namelist():
            if name.endswith('.jpg'):
                assert (prepared / 'coco' / name).read_bytes() == packed.read(name)
    assert not list(prepared.rglob('.writing-*'))
    depth = cv2.imread(str(prepared / 'nyu/annotations/test/kitchen_0002.png'), cv2.IMREAD_UNCHANGED)
    with h5py.File(archives / 'nyu_depth_v2_labeled.mat') as file:
        np.testing.assert_allclose(depth / 1000, file['depths'][1].T, atol=6e-4)
    # The second time nothing is unpacked, so that archives are not needed.
    paper.main(['prepare', '--methods', 'icon', '--data-root', str(prepared), '--archives', str(prepared / 'none')])


SHORT = ['train_cfg.max_iters=2', 'train_cfg.val_interval=9']
SWIN = ['model.backbone.embed_dims=16', 'model.backbone.depths=[1,1,1,1]', 'model.backbone.num_heads=[1,2,4,8]']
SWIN += ['model.backbone.init_cfg=None']
LOADERS = ('train', 'val', 'test')
IN_PROCESS = [f'{name}_dataloader.num_workers=0' for name in LOADERS]
IN_PROCESS += [f'{name}_dataloader.persistent_workers=False' for name in LOADERS]
VIT = [
    'model.backbone.arch=deit-tiny',
    'model.backbone.img_size=64',
    'model.backbone.init_cfg=None',
    *(f'{name}_dataloader.dataset.pipeline.IMAGE.scale=64' for name in LOADERS),
    *(f'{name}_dataloader.dataset.pipeline.CROP.crop_size=64' for name in ('val', 'test')),
    'model.neck.input_features=192',
    'model.head.in_channels=192',
    'optim_wrapper.type=BFloat16OptimWrapper',
    'train_cfg.max_epochs=1',
    'train_dataloader.batch_size=2',
]


def vit(first):
    """What makes a ViT and its images small; ``first`` is where the pipeline changes the size of an image."""
    return [option.replace('IMAGE', str(first)).replace('CROP', str(first + 1)) for option in VIT]


CASES = {
    'cifar100': ('vit-base', vit(0)),
    'svhn': ('vit-base', vit(0)),
    'food101': ('vit-base', vit(1)),
    'coco': (
        'mask-rcnn_swin-t_fpn_METHOD_1x',
        [
            *SWIN,
            f'model.neck.in_channels=[{",".join(map(str, PYRAMID))}]',
            'train_dataloader.dataset.pipeline.2.scale=(128,96)',
            'val_dataloader.dataset.pipeline.1.scale=(128,96)',
            'test_dataloader.dataset.pipeline.1.scale=(128,96)',
            'model.roi_head.bbox_head.fc_out_channels=32',
            'model.test_cfg.rcnn.score_thr=0.0',  # untrained scores are low
            'model.test_cfg.rcnn.max_per_img=20',
            'train_cfg.max_epochs=1',
            'train_dataloader.batch_size=2',
        ],
    ),
    'ade20k': (
        'swin-large',
        [
            *SWIN,
            *SHORT,
            f'model.decode_head.in_channels=[{",".join(map(str, PYRAMID))}]',
            'model.decode_head.channels=16',
            f'model.auxiliary_head.in_channels={PYRAMID[2]}',
            'model.auxiliary_head.channels=16',
            'train_dataloader.batch_size=2',
            'default_hooks.checkpoint.interval=2',
            'model.data_preprocessor.size=(96,96)',
            'train_dataloader.dataset.pipeline.2.scale=(128,96)',
            'train_dataloader.dataset.pipeline.3.crop_size=(96,96)',
            *(f'{name}_dataloader.dataset.pipeline.1.scale=(128,96)' for name in ('val', 'test')),
        ],
    ),
    'nyu': (
        'depth_swinv2-base',
        [
            *SHORT,
            'model.backbone.arch=tiny',
            'model.backbone.window_size=[5,5,5,5]',
            'model.backbone.init_cfg=None',
            'model.decode_head.in_channels=768',
            'train_dataloader.batch_size=2',
            'default_hooks.checkpoint.interval=2',
            'model.data_preprocessor.size=(96,96)',
            'train_dataloader.dataset.pipeline.4.crop_size=(96,96)',
        ],
    ),
}


@pytest.mark.parametrize('task', CASES)
@pytest.mark.filterwarnings('ignore')
def test_runs_and_fills_the_table(task, prepared, tmp_path, capsys, monkeypatch, no_weights):
    """What takes a process of its own in a run is a copy of one that has imported the libraries."""
    words, options = CASES[task]
    called = []

    def launch(command, arguments, gpus):
        called.append(command)
        if task == 'cifar100':  # MMPretrain checks the hashes of the published files, which these are not
            dict(train=cli_train, test=cli_test)[command].main(arguments)
        else:
            tool(f'{command}.py', *arguments)

    monkeypatch.setattr(CIFAR100, '_check_integrity', lambda self: True)
    monkeypatch.setattr(paper, 'launch', launch)
    options = [*options, *IN_PROCESS]
    common = ['--tasks', task, '--methods', 'icon', '--models', words, '--gpus', '1', '--data-root', str(prepared)]
    common += ['--out', str(tmp_path)]
    paper.main(['run', *common, '--cfg-options', *options])
    assert called == ['train', 'test']
    (result,) = tmp_path.glob('*/*.json')
    score = json.loads(result.read_text())['metrics'][TASKS[task].metric]
    assert np.isfinite(score)
    capsys.readouterr()
    paper.main(['run', *common, '--cfg-options', *options])
    assert called == ['train', 'test'] and 'finished' in capsys.readouterr().out
    paper.main(['table', *common])
    text = (tmp_path / 'table.md').read_text()
    (row,) = [line for line in text.splitlines() if line.startswith(f'| {task} ')]
    assert f'| {TASKS[task].factor * score:.4g} * | {TASKS[task].claim} |' in row  # the training was shortened
    (note,) = [line for line in text.splitlines() if line.startswith(r'\* ')]
    assert 'is not of the recipe: ' in note and all(option.partition('=')[0] in note for option in options)
    assert 'data_root' not in note
    with pytest.raises(SystemExit, match='was finished with other settings'):
        paper.main(['run', *common, '--cfg-options', *options, 'randomness.seed=7'])
    result.write_text('{}')
    with pytest.raises(SystemExit, match='is damaged; remove it'):
        paper.main(['table', *common])


@pytest.mark.filterwarnings('ignore')
def test_goes_on_in_several_processes(prepared, tmp_path, monkeypatch, no_weights):
    """A training of two processes that dies after its first step goes on with the second, and is then tested."""
    words, options = CASES['ade20k']
    options = [option.replace('checkpoint.interval=2', 'checkpoint.interval=1') for option in options]
    options += [*IN_PROCESS, 'env_cfg.dist_cfg.backend=gloo', 'default_hooks.logger.interval=1']
    called = []

    def launch(command, arguments, gpus):
        assert gpus == 2
        called.append(command)
        if len(called) == 1:
            ranks('train.py', *arguments, 'train_cfg.max_iters=1')
            raise SystemExit('killed')
        ranks(f'{command}.py', *arguments)

    monkeypatch.setattr(paper, 'launch', launch)
    common = ['--tasks', 'ade20k', '--methods', 'icon', '--models', words, '--gpus', '2', '--data-root', str(prepared)]
    command = ['run', *common, '--out', str(tmp_path), '--cfg-options', *options]
    with pytest.raises(SystemExit, match='killed'):
        paper.main(command)
    assert not list(tmp_path.glob('*/*.json'))
    paper.main(command)
    assert called == ['train', 'train', 'test']
    (result,) = tmp_path.glob('*/*.json')
    assert json.loads(result.read_text())['checkpoint'] == 'iter_2.pth'
    steps = [line['step'] for line in scalars(result.with_suffix('')) if 'loss' in line]
    assert steps == [1, 2]


def test_what_is_missing_for_a_later_run_shows_before_the_first(prepared, tmp_path, monkeypatch, no_weights):
    monkeypatch.setattr(paper, 'launch', lambda *args: pytest.fail('a training was begun'))
    shutil.copytree(prepared / PUBLISHED['svhn'].folder, tmp_path / PUBLISHED['svhn'].folder)
    common = ['--methods', 'icon', '--data-root', str(tmp_path), '--out', str(tmp_path / 'out')]
    with pytest.raises(SystemExit, match='lacks .*: download .* prepare --tasks food101'):
        paper.main(['run', '--tasks', 'svhn', 'food101', *common])
    assert not (tmp_path / 'out').exists()
    run = paper.PaperRun('svhn', TASKS['svhn'].model, 'full')
    begun = run.result(tmp_path / 'out').with_suffix('') / 'settings.json'
    begun.parent.mkdir(parents=True)
    begun.write_text('{}')
    with pytest.raises(SystemExit, match='was begun with other settings'):
        paper.main(['run', '--tasks', 'svhn', *common, '--methods', 'icon', 'full'])


def test_a_result_of_the_recipe_has_no_mark(tmp_path):
    run = paper.PaperRun('svhn', TASKS['svhn'].model, 'icon')
    args = paper.parse_args(['run', '--gpus', '4', '--data-root', str(tmp_path)])
    _, options = paper.config_of(run, args)
    assert paper.changes_of(run, dict(gpus=4, options=options)) == []
    changed = {**options, 'train_cfg.max_epochs': 1}
    assert paper.changes_of(run, dict(gpus=4, options=changed)) == ['train_cfg.max_epochs=1']
    assert paper.changes_of(run, dict(gpus=2, options=options)) == ['train_dataloader.batch_size=256']


def test_launch_starts_one_process_for_each_gpu(monkeypatch):
    started = []

    def run(command, check):
        started.append(command[1:])
        return SimpleNamespace(returncode=len(started) - 1)

    monkeypatch.setattr(paper.subprocess, 'run', run)
    paper.launch('train', ['a.py'], 1)
    assert started == [['-m', 'iconformer_mm', 'train', 'a.py']]
    with pytest.raises(SystemExit, match='train a.py --launcher pytorch` failed with exit code 1; .* goes on from'):
        paper.launch('train', ['a.py'], 2)
    assert started[1][:4] == ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


SMALL = ['model.backbone.arch=deit-small', 'model.neck.input_features=384', 'model.head.in_channels=384']


def test_a_detector_that_finds_nothing_scores_zero():
    run = paper.PaperRun('coco', TASKS['coco'].model, 'icon')
    assert paper.with_score(run, {}) == {'coco/segm_mAP': 0.0}
    assert paper.with_score(run, {'coco/segm_mAP': 0.5}) == {'coco/segm_mAP': 0.5}
    with pytest.raises(ValueError, match='gave no coco/segm_mAP; it gave coco/bbox_mAP'):
        paper.with_score(run, {'coco/bbox_mAP': 0.5})


def test_plan_says_what_is_missing(tmp_path, capsys):
    paper.main(['plan', '--tasks', 'svhn', '--methods', 'icon', '--data-root', str(tmp_path), '--cfg-options', *SMALL])
    printed = capsys.readouterr().out
    assert '7,325,700' in printed and '7,154' in printed  # 100 epochs, 1,024 images a step
    assert 'svhn: download http://ufldl.stanford.edu/housenumbers/train_32x32.mat and' in printed
    assert f'into {tmp_path / "downloads"}' in printed
    # An independent count: a small ViT takes 4.6 GMAC, and as much backwards, at 35 % of 312 TFLOP/s.
    hours = 7_325_700 * 2 * 4.6e9 * 2 / (0.35 * 312e12) / 3600
    (row,) = [line for line in printed.splitlines() if 'svhn' in line and '7,154' in line]
    assert float(re.findall(r'(\d+\.\d\d)', row)[-1]) == pytest.approx(hours, rel=0.1)


@pytest.mark.parametrize('task', TASKS)
def test_models_have_all_methods(task):
    assert TASKS[task].model in models_of(task)
    for model in models_of(task):
        for method in paper.METHODS:
            assert (ROOT / 'configs' / task / f'{model.replace("METHOD", method)}.py').is_file()


@pytest.mark.parametrize('task', TASKS)
def test_missing_data_is_named(task, tmp_path):
    with pytest.raises(SystemExit, match='download http.* into .*downloads'):
        paper.main(['prepare', '--tasks', task, '--data-root', str(tmp_path)])


def test_bad_input(archives, tmp_path, monkeypatch):
    def prepare(task, change=None):
        own = tmp_path / 'downloads'
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(archives, own)
        if change is not None:
            path = own / change
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        paper.main(['prepare', '--tasks', task, '--methods', 'icon', '--data-root', str(tmp_path)])

    for task, name in (
        ('coco', 'val2017.zip'),
        ('food101', 'food-101.tar.gz'),
        ('svhn', 'test_32x32.mat'),
        ('nyu', 'nyu_depth_v2_labeled.mat'),
    ):
        with pytest.raises(SystemExit, match=f'{name} is (damaged|not a valid)'):
            prepare(task, name)
        assert PUBLISHED[task].missing(tmp_path) == list(PUBLISHED[task].needed)

    with monkeypatch.context() as patch:
        patch.setattr('iconformer_mm.files.shutil.disk_usage', lambda folder: SimpleNamespace(free=0))
        with pytest.raises(SystemExit, match='unpacking ADEChallengeData2016.zip needs about .* are free'):
            prepare('ade20k')

    def unreachable(url, place, prefix):
        raise OSError('no network')

    monkeypatch.setattr('torch.hub.download_url_to_file', unreachable)
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path / 'hub'))
    with pytest.raises(SystemExit, match=r'cannot be downloaded \(no network\): download https.* and put it at .*hub'):
        prepare('svhn')
    with pytest.raises(SystemExit) as end:
        paper.main(['plan', '--tasks', 'imagenet'])
    assert end.value.code == 2
    with pytest.raises(SystemExit, match='no config begins so; there are .*METHOD'):
        paper.main(['plan', '--tasks', 'svhn', '--models', 'resnet'])
    with pytest.raises(SystemExit, match='1024 images cannot be shared evenly by 3 GPUs'):
        paper.main(['plan', '--tasks', 'svhn', '--methods', 'icon', '--gpus', '3'])
    with pytest.raises(SystemExit, match='lacks train_32x32.mat.* download http'):
        paper.main(['run', '--tasks', 'svhn', '--methods', 'icon', '--data-root', str(tmp_path / 'empty')])
