"""Two iterations of whole benchmark configs, on scenes instead of their data."""

import copy
import uuid

import numpy as np
import torch
from mmengine.runner import Runner

from iconformer_mm import summarize
from iconformer_mm.datasets.scenes import SHAPES, WRITERS, scenes

PYRAMID = [16, 32, 64, 128]


def write_scenes(root):
    """Scenes in the formats of COCO, ADE20K and NYU-v2."""
    for name in ('coco', 'ade20k'):
        for split in ('train', 'val'):
            WRITERS[name](root / name, split, scenes(4 if split == 'train' else 2, 0, size=(96, 128)))
    for split in ('train', 'val'):
        WRITERS['nyu'](root / 'nyu', split, scenes(2, 0, size=(480, 640)))
    return root


def divided(size, divisor):
    """A size, or several, in a part of the pixels."""
    return size // divisor if isinstance(size, int) else type(size)(divided(n, divisor) for n in size)


def shrink_images(pipeline, divisor):
    """Divide all sizes of a pipeline."""
    for step in pipeline:
        for key in ('scale', 'scales', 'crop_size', 'max_size'):
            if step.get(key) and step['type'] != 'RandomFlip':
                step[key] = divided(step[key], divisor)
        for branch in step.get('transforms', []):
            shrink_images(branch, divisor)


def shrink_segmentor(model, divisor):
    """Divide the sizes that a segmentor has of its own."""
    for part, keys in (
        (model.data_preprocessor, ['size']),
        (model.test_cfg, ['crop_size', 'stride']),
        (model.get('backbone', {}), ['img_size']),
    ):
        part.update({key: divided(part[key], divisor) for key in keys if part.get(key)})


def feed(cfg, data):
    """Point the data sets at the scenes. Pipelines change in sizes only: COCO's to a fifth, ADE20K's to a quarter."""
    folder = {'mmdet': 'coco', 'mmseg': 'ade20k'}[cfg.default_scope]
    if cfg.model.type == 'DepthEstimator':
        folder = 'nyu'
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg[name]
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = f'{data / folder}/'
        if folder == 'coco':
            loader.dataset.metainfo = dict(classes=SHAPES)
            shrink_images(loader.dataset.pipeline, 5)
        if folder == 'ade20k':
            shrink_images(loader.dataset.pipeline, 4)
    if folder == 'ade20k':
        shrink_segmentor(cfg.model, 4)
    cfg.train_dataloader.batch_size = 2
    for name in ('val_evaluator', 'test_evaluator'):
        if folder == 'coco':
            cfg[name].ann_file = f'{data / "coco" / "annotations" / "instances_val2017.json"}'


def two_iterations(cfg, data, work_dir):
    """Feed a config from scenes, and cut it short."""
    feed(cfg, data)
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
    cfg.param_scheduler = []
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=2)
    cfg.log_processor = dict(by_epoch=False)
    cfg.update(work_dir=str(work_dir), experiment_name=uuid.uuid4().hex, log_level='WARNING', randomness=dict(seed=0))
    return cfg


def check_training_and_test(cfg, method, metric):
    """Train and test; what is frozen stays, what is trained moves, and there is a finite score."""
    cfg.visualizer = None
    runner = Runner.from_cfg(copy.deepcopy(cfg))
    before = {}
    init = runner.model.init_weights

    def init_and_remember():
        init()
        before.update((n, p.detach().clone()) for n, p in runner.model.backbone.named_parameters())

    runner.model.init_weights = init_and_remember
    runner.train()
    assert summarize(runner.model).method == method
    for name, parameter in runner.model.backbone.named_parameters():
        if 'adapter' not in name:
            assert torch.equal(parameter, before[name]), name
    if method != 'frozen':
        assert any(p.abs().sum() > 0 for n, p in runner.model.backbone.named_parameters() if '.up.weight' in n)

    cfg.load_from = f'{cfg.work_dir}/iter_2.pth'
    cfg.experiment_name = uuid.uuid4().hex
    results = Runner.from_cfg(cfg).test()
    assert metric in results and np.isfinite(results[metric])


def narrow_mask2former(head):
    """The same head with 32 channels, one layer each and ten queries."""
    attention = dict(embed_dims=32, num_heads=4)
    ffn = dict(embed_dims=32, feedforward_channels=64)
    head.update(in_channels=PYRAMID, feat_channels=32, out_channels=32, num_queries=10)
    head.positional_encoding.num_feats = 16
    head.pixel_decoder.positional_encoding.num_feats = 16
    encoder, decoder = head.pixel_decoder.encoder, head.transformer_decoder
    encoder.num_layers = decoder.num_layers = 1
    encoder.layer_cfg.self_attn_cfg.update(attention)
    decoder.layer_cfg.self_attn_cfg.update(attention)
    decoder.layer_cfg.cross_attn_cfg.update(attention)
    encoder.layer_cfg.ffn_cfg.update(ffn)
    decoder.layer_cfg.ffn_cfg.update(ffn)
