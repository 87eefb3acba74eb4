"""Training from a cache of the frozen prefix."""

import math
import os
import uuid
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import free_port
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from prefix_runs import TASKS, make_config, train, write_data
from tiny_runs import config

from iconformer_mm.analysis.lr_range_test import LRRangeTestHook, prepare_config
from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.datasets.checks import DataError
from iconformer_mm.engine import build_runner
from iconformer_mm.engine.prefix_cache import PrefixCacheOptions, caching
from iconformer_mm.engine.prefix_cache.draws import CachedDataset
from iconformer_mm.engine.prefix_cache.shards import Shards
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.prefix import PrefixError

HOOK = 'custom_hooks.0'
FLIP = [dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp('scenes'))


def same(a, b):
    return len(a) == len(b) and all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b))


@pytest.mark.parametrize('host', ['vit', 'swin'])
@pytest.mark.parametrize('task', TASKS)
@pytest.mark.filterwarnings('ignore')
def test_training_is_bit_identical_without_augmentation(task, host, data, tmp_path):
    expected, scalars = train(make_config(task, host, data, tmp_path / 'plain'))
    cache = dict(dir=str(tmp_path / 'cache'))
    found, cached_scalars = train(make_config(task, host, data, tmp_path / 'cached', prefix_cache=cache))
    assert folders(tmp_path / 'cache') == ['training', 'validation']
    assert found.keys() == expected.keys()
    assert [n for n, v in expected.items() if not torch.equal(v, found[n])] == []
    assert any('val/' in n for n in scalars) and scalars.keys() == cached_scalars.keys()
    assert [n for n in scalars if not same(scalars[n], cached_scalars[n])] == []


# Runs of seconds on drawn strokes


def folders(cache):
    return sorted(p.name.rpartition('-')[0] for p in cache.iterdir())


def make(work_dir, cache=None, **changes):
    """A run of four steps, by default with one of two blocks frozen."""
    options = {} if cache is None else {f'{HOOK}.prefix_cache': dict(dir=str(cache))}
    blocks = {} if changes.pop('frozen', False) else {f'{HOOK}.blocks': 'last:1'}
    short = {'train_cfg.max_epochs': 1, 'default_hooks.checkpoint': None}
    cfg = config(work_dir, **{**blocks, **options, **short, **changes})
    cfg.experiment_name = uuid.uuid4().hex
    return build_runner(cfg)


def fit(*args, **changes):
    runner = make(*args, **changes)
    runner.train()
    return {name: value.clone() for name, value in runner.model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys() and [n for n in a if not torch.equal(a[n], b[n])] == []


def counted(monkeypatch):
    """Counts the images whose prefix is computed, by what they are computed for."""
    computed = []
    original = caching._Filler._compute

    def compute(self, source, shards, missing):
        computed.extend((source.name, view) for view, shard in missing for _ in shards.range(shard))
        original(self, source, shards, missing)

    monkeypatch.setattr(caching._Filler, '_compute', compute)
    return computed


VARIANTS = {
    'iterations': {
        'train_cfg': dict(by_epoch=False, max_iters=5, val_interval=5),
        'train_dataloader.sampler.type': 'InfiniteSampler',
        'param_scheduler': None,
        'log_processor': dict(by_epoch=False),
    },
    'workers and LoRA': {
        'train_dataloader.num_workers': 2,
        'val_dataloader.num_workers': 1,
        f'{HOOK}.method': dict(_delete_=True, type='lora', rank=2),
    },
    'bfloat16 autocast': {'optim_wrapper.type': 'BFloat16OptimWrapper'},
    'bfloat16 base and recomputation': {f'{HOOK}.frozen_dtype': 'bfloat16', f'{HOOK}.with_cp': True},
    'linear probing': {f'{HOOK}.method': dict(_delete_=True, type='frozen'), 'frozen': True},
    'EMA and dropout of adapters': {f'{HOOK}.method': dict(_delete_=True, type='adaptformer', dropout=0.5)},
}


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.filterwarnings('ignore')
def test_together_with(variant, tmp_path):
    def run(name, cache=None):
        changes = dict(VARIANTS[variant])
        loop = changes.pop('train_cfg', None)
        runner = make(tmp_path / name, cache, **changes)
        if loop is not None:
            runner._train_loop = loop
        if 'EMA' in variant:
            runner.register_hook(HOOKS.build(dict(type='EMAHook', momentum=0.1)))
        runner.train()
        return runner

    plain, cached = run('plain'), run('cached', tmp_path / 'cache')
    assert_equal(plain.model.state_dict(), cached.model.state_dict())
    scores = [r.message_hub.get_scalar('val/accuracy/top1').data[0] for r in (plain, cached)]
    assert len(scores[0]) and list(scores[0]) == list(scores[1])


def test_a_cache_is_filled_once_for_methods_and_seeds(tmp_path, monkeypatch):
    base = tmp_path / 'base.pth'
    torch.save(make(tmp_path / 'base').model.backbone.state_dict(), base)
    weights = {'model.backbone.init_cfg': dict(type='Pretrained', checkpoint=str(base))}
    computed = counted(monkeypatch)
    for seed, method in enumerate(('icon', 'adaptformer', 'lora')):
        methods = {f'{HOOK}.method': dict(_delete_=True, type=method), 'randomness.seed': seed}
        fit(tmp_path / method, tmp_path / 'cache', **weights, **methods)
    assert sorted(computed) == [('training', 0)] * 20 + [('validation', 0)] * 20


def test_more_views_add_to_those_there_are(tmp_path, monkeypatch):
    computed = counted(monkeypatch)
    cache, flips = tmp_path / 'cache', {'train_dataloader.dataset.pipeline': FLIP}
    for views, expected in ((1, {0}), (3, {1, 2}), (2, set())):
        computed.clear()
        fit(tmp_path / str(views), cache, **flips, **{f'{HOOK}.prefix_cache.views': views})
        assert {view for name, view in computed if name == 'training'} == expected


def test_views_are_draws_of_the_pipeline(tmp_path):
    """Every image is read from each of its views, which differ, and labels go with them."""
    flips = {'train_dataloader.dataset.pipeline': FLIP, f'{HOOK}.prefix_cache.views': 4}
    seen = []

    class Look(Hook):
        priority = 'VERY_LOW'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            assert 'prefix' not in data_batch and not data_batch['inputs'][0].any()
            tokens = runner.custom._replay.records[0]['layers.1/0/0']
            for sample, x in zip(data_batch['data_samples'], tokens):
                seen.append((sample.sample_idx, int(sample.gt_label), sample.flip, x.sum().item()))

    meta = ('sample_idx', 'flip')
    flips['train_dataloader.dataset.pipeline'] = [FLIP[0], dict(type='PackInputs', meta_keys=meta)]
    runner = make(tmp_path / 'run', tmp_path / 'cache', **flips, **{'train_cfg.max_epochs': 20})
    runner.custom = next(h for h in runner.hooks if type(h).__name__ == 'PEFTHook')._cache
    runner.register_hook(Look())
    runner.train()
    by_image = {}
    for index, label, flip, value in seen:
        by_image.setdefault((index, label), set()).add((flip, value))
    assert len(by_image) == 20
    kinds = [len(found) for found in by_image.values()]
    assert max(kinds) == 2 and sum(kinds) > 30  # flipped and not, as each image was drawn
    assert all(len({flip for flip, _ in found}) == len(found) for found in by_image.values())


class Interrupted(Exception):
    pass


class Interrupt(Hook):
    priority = 'LOWEST'

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == 6:
            raise Interrupted


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    changes = {
        'train_dataloader.dataset.pipeline': FLIP,
        f'{HOOK}.prefix_cache.views': 3,
        'train_cfg.max_epochs': 2,
        'default_hooks.checkpoint': dict(type='AdapterCheckpointHook', interval=1),
    }
    whole = fit(tmp_path / 'whole', tmp_path / 'cache', **changes)
    runner = make(tmp_path / 'cut', tmp_path / 'cache', **changes)
    runner.register_hook(Interrupt())
    with pytest.raises(Interrupted):
        runner.train()
    assert_equal(whole, fit(tmp_path / 'cut', tmp_path / 'cache', **changes, resume=True))


def test_after_training_the_runner_is_as_it_was(tmp_path):
    runner = make(tmp_path / 'run', tmp_path / 'cache')
    runner.train()
    assert not isinstance(runner.train_dataloader.dataset, CachedDataset)
    assert not isinstance(runner.val_dataloader.dataset, CachedDataset)
    first = runner.val_loop.run()
    assert first['accuracy/top1'] == runner.message_hub.get_scalar('val/accuracy/top1').current()
    assert get_injection(runner.model) is not None
    assert 'forward' not in vars(runner.model.backbone.layers[0])


def test_a_range_test_reads_from_a_cache(tmp_path, monkeypatch):
    computed = counted(monkeypatch)
    losses = []
    for cache in (None, tmp_path / 'cache', tmp_path / 'cache'):
        options = {} if cache is None else {f'{HOOK}.prefix_cache': dict(dir=str(cache))}
        cfg = config(tmp_path / 'run', **{f'{HOOK}.blocks': 'last:1', **options})
        prepare_config(cfg, 10)
        cfg.experiment_name = uuid.uuid4().hex
        cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
        runner, hook = build_runner(cfg), LRRangeTestHook(1e-4, 1e-2, 10)
        runner.register_hook(hook)
        runner.train()
        losses.append(hook.test.losses)
    assert losses[0] == losses[1] == losses[2]
    assert computed == [('training', 0)] * 20


# Two processes


def work(rank, folder, port, cached):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    caching.SHARD = 1  # as many images in a shard as in a batch
    write = Shards.write

    def noted(self, view, shard, records):
        Path(folder, f'wrote-{rank}-{self.folder.name}-{shard}').write_text('')
        write(self, view, shard, records)

    Shards.write = noted
    changes = {'launcher': 'pytorch', 'randomness': dict(seed=0)}
    runner = make(Path(folder, 'cached' if cached else 'plain'), Path(folder, 'cache') if cached else None, **changes)
    runner.train()
    if rank == 0:
        torch.save(runner.model.module.state_dict(), Path(folder, f'{cached}.pt'))
    del runner
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings('ignore')
def test_two_processes_fill_their_parts_and_one_reads_them_later(tmp_path, monkeypatch):
    for cached in (False, True):
        args = (str(tmp_path), free_port(), cached)
        mp.start_processes(work, args=args, nprocs=2, start_method='forkserver')
    assert_equal(*(torch.load(tmp_path / f'{cached}.pt') for cached in (False, True)))
    for rank in (0, 1):
        for name in ('training', 'validation'):
            assert len(list(tmp_path.glob(f'wrote-{rank}-{name}-*'))) == 2
    computed = counted(monkeypatch)
    fit(tmp_path / 'later', tmp_path / 'cache')
    assert computed == []


# What a cache depends on


@pytest.fixture
def images(tmp_path):
    """A folder of images, one folder a class."""
    for label in 'ab':
        for index in range(4):
            path = tmp_path / 'images' / label / f'{index}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), np.full((32, 32), 20 * index, np.uint8))
    return tmp_path / 'images'


def on_images(images, pipeline=()):
    steps = [dict(type='LoadImageFromFile', color_type='grayscale'), *pipeline, dict(type='PackInputs')]
    dataset = dict(_delete_=True, type='CustomDataset', data_root=str(images), pipeline=steps)
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    return {f'{name}.dataset': dataset for name in loaders} | {
        'val_cfg': None,
        'val_dataloader': None,
        'val_evaluator': None,
        'model.head.num_classes': 2,
    }


def test_another_base_pipeline_or_image_is_another_cache(images, tmp_path, monkeypatch):
    computed = counted(monkeypatch)

    def count(**changes):
        computed.clear()
        fit(tmp_path / uuid.uuid4().hex, tmp_path / 'cache', **{**on_images(images), **changes})
        return len(computed)

    assert count() == 8
    resized = [dict(type='Resize', scale=(32, 32))]
    assert count(**on_images(images, resized)) == 8
    assert count(**{'randomness.seed': 1}) == 8  # the base is random here
    assert count(**{'model.data_preprocessor.std': [100.0]}) == 8
    assert count(**{'optim_wrapper.type': 'BFloat16OptimWrapper'}) == 8
    cv2.imwrite(str(images / 'a' / '0.png'), np.full((32, 32), 255, np.uint8))
    assert count() == 8
    assert count() == 0


def test_a_cache_that_pipeline_and_base_no_longer_give(images, tmp_path):
    """What no key shows, such as changed code, is found by computing the first image anew."""
    fit(tmp_path / 'a', tmp_path / 'cache', **on_images(images))
    from mmcv.transforms import LoadImageFromFile

    original = LoadImageFromFile.transform

    def changed(self, results):
        results = original(self, results)
        results['img'] = 255 - results['img']
        return results

    LoadImageFromFile.transform = changed
    try:
        with pytest.raises(DamagedFileError, match='does not hold what the pipeline and the frozen blocks give now'):
            fit(tmp_path / 'b', tmp_path / 'cache', **on_images(images))
    finally:
        LoadImageFromFile.transform = original


def test_a_truncated_cache(tmp_path):
    fit(tmp_path / 'a', tmp_path / 'cache')
    (shard,) = (tmp_path / 'cache').glob('training-*/view00-*')
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(DamagedFileError, match='Delete this file, and the next run computes it again'):
        fit(tmp_path / 'b', tmp_path / 'cache')
    shard.unlink()
    fit(tmp_path / 'c', tmp_path / 'cache')


def test_a_read_only_cache_is_read_when_it_is_complete(tmp_path, monkeypatch):
    expected = fit(tmp_path / 'a', tmp_path / 'cache')

    def refuse(*args, **kwargs):
        raise OSError(30, 'Read-only file system')

    # Folders are writable for root, whatever their mode.
    monkeypatch.setattr(caching, 'filling', refuse)
    monkeypatch.setattr(Shards, 'write', refuse)
    assert_equal(fit(tmp_path / 'b', tmp_path / 'cache'), expected)


def test_an_interrupted_filling_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(caching, 'SHARD', 1)
    write = Shards.write
    written = []

    def stop(self, view, shard, records):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, view, shard, records)

    monkeypatch.setattr(Shards, 'write', stop)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / 'a', tmp_path / 'cache')
    monkeypatch.setattr(Shards, 'write', write)
    computed = counted(monkeypatch)
    found = fit(tmp_path / 'b', tmp_path / 'cache')
    assert computed == [('training', 0)] * 5 + [('validation', 0)] * 20
    assert_equal(found, fit(tmp_path / 'plain'))


# What is refused, before time is spent


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ('cache', "prefix_cache must be a dict, e.g. dict(dir=..., views=4), got 'cache'"),
        (dict(views=4), 'prefix_cache needs `dir`'),
        (dict(dir=''), 'prefix_cache needs `dir`'),
        (dict(dir='a', view=4), "prefix_cache has no option 'view' (did you mean 'views'?)"),
        (dict(dir='a', views=0), 'views must be None or a number from 1 to 99, got 0'),
        (dict(dir='a', views=True), 'views must be None or a number from 1 to 99, got True'),
        (dict(dir='a', dtype='int8'), "dtype must be None, 'float32', 'bfloat16' or 'float16', got 'int8'"),
        (dict(dir='a', validation='no'), "validation must be True or False, got 'no'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError) as error:
        PrefixCacheOptions.of(options)
    assert message in str(error.value)


class SwitchRecipeHook(Hook):
    """One that changes the pipeline in training."""


def refused(tmp_path, error=PrefixError, hook=None, **changes):
    runner = make(tmp_path / 'run', tmp_path / 'cache', **changes)
    if hook is not None:
        runner.register_hook(hook)
    with pytest.raises(error) as raised:
        runner.train()
    assert not list(tmp_path.glob('cache/*/view*'))
    return str(raised.value)


def test_an_augmentation_without_views(tmp_path):
    text = refused(tmp_path, **{'train_dataloader.dataset.pipeline': FLIP})
    assert 'augments at random (image' in text and 'e.g. views=4' in text


def test_all_blocks_adapted(tmp_path):
    assert "blocks='last:1'" in refused(tmp_path, frozen=True)


def test_mixup(tmp_path):
    preprocessor = dict(
        type='ClsDataPreprocessor',
        mean=[0.0],
        std=[255.0],
        num_classes=4,
        to_onehot=True,
        batch_augments=dict(augments=dict(type='Mixup', alpha=0.2)),
    )
    assert '(batch_augments)' in refused(tmp_path, **{'model.data_preprocessor': preprocessor})


def test_a_hook_that_changes_the_pipeline(tmp_path):
    assert 'SwitchRecipeHook changes the data set in training' in refused(tmp_path, hook=SwitchRecipeHook())


def test_a_compiled_model(tmp_path):
    assert 'does not work with a compiled model' in refused(tmp_path, compile=True)


def test_dropout_in_the_prefix(tmp_path):
    assert 'Set drop_rate=0' in refused(tmp_path, **{'model.backbone.drop_rate': 0.1})


def test_images_of_unequal_size(images, tmp_path):
    cv2.imwrite(str(images / 'b' / '3.png'), np.full((24, 40), 255, np.uint8))
    text = refused(tmp_path, **on_images(images))
    assert 'have the sizes (32, 32) and (24, 40) after the pipeline' in text and "type='Pad'" in text


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.setattr('iconformer_mm.engine.prefix_cache.shards.RESERVE', 1 << 60)
    text = refused(tmp_path)
    assert 'the training data (20 images, 1 views' in text and 'the validation data (20 images' in text


def test_a_collate_function_that_drops_keys(tmp_path):
    runner = make(tmp_path / 'run', tmp_path / 'cache')
    runner.train_loop.dataloader.collate_fn = lambda samples: dict(
        inputs=torch.stack([s['inputs'] for s in samples]), data_samples=[s['data_samples'] for s in samples]
    )
    with pytest.raises(PrefixError, match='The collate function must keep every key'):
        runner.train()


def test_something_sets_the_pipeline_in_training(tmp_path):
    class Change(Hook):
        def before_train_epoch(self, runner):
            runner.train_dataloader.dataset.pipeline = None

    runner = make(tmp_path / 'run', tmp_path / 'cache')
    runner.register_hook(Change())
    with pytest.raises(DataError, match="something sets 'pipeline' of the data set in training"):
        runner.train()


def test_a_model_that_reads_the_image_beside_its_backbone(tmp_path):
    runner = make(tmp_path / 'run', tmp_path / 'cache')
    loss = runner.model.loss
    runner.model.loss = lambda inputs, samples: {**loss(inputs, samples), 'loss_pixels': inputs.float().mean()}
    with pytest.raises(PrefixError, match="reads the images beside its backbone, since without them its 'loss_pixels'"):
        runner.train()
