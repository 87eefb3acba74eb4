"""Trainings of two steps of every task, on ViT and Swin, with or without a cache of the frozen prefix."""

import uuid

import torch
from conftest import ROOT
from tiny_runs import config as classification

from iconformer_mm.datasets.scenes import WRITERS, scenes
from iconformer_mm.engine import build_runner, load_config

SCENES = dict(
    semantic=('upernet_swin-scenes_icon_target.py', 'ade20k'),
    detection=('mask-rcnn_swin-scenes_fpn_icon_target.py', 'coco'),
    depth=('depth_swin-scenes_icon_target.py', 'nyu'),
)
TASKS = ('classification', *SCENES)
PYRAMID = (24, 48, 96, 192)
SMALL_SWIN = dict(embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8])
RANDOM = ('RandomFlip', 'PhotoMetricDistortion')


def write_data(root):
    """A few scenes in the format of each dense task."""
    for _, kind in SCENES.values():
        for split in ('train', 'val'):
            WRITERS[kind](root / kind, split, scenes(2, 0, 'target'))
    return root


def make_config(task, host, data, work_dir, **hook):
    """A config of a task with a frozen prefix; further arguments are those of its PEFTHook."""
    if task == 'classification':
        cfg = classification(work_dir)
        if host == 'swin':
            cfg.model.backbone = dict(
                type='SwinTransformer',
                arch=SMALL_SWIN,
                img_size=32,
                window_size=2,
                in_channels=1,
                drop_path_rate=0.0,
                pad_small_map=True,
            )
            cfg.model.neck = dict(type='GlobalAveragePooling')
            cfg.model.head.in_channels = 128
        peft = cfg.custom_hooks[0]
    else:
        name, kind = SCENES[task]
        cfg = load_config(str(ROOT / 'configs' / 'scenes' / name))
        for part in ('train', 'val', 'test'):
            cfg[f'{part}_dataloader'].dataset.data_root = str(data / kind)
            if kind == 'coco' and part != 'train':
                cfg[f'{part}_evaluator'].ann_file = str(data / kind / 'annotations' / 'instances_val2017.json')
        cfg.train_dataloader.batch_size = 2
        cfg.train_cfg.update(max_iters=2, val_interval=2)
        cfg.default_hooks.checkpoint = None
        if host == 'vit':
            put_vit(cfg, task)
        peft = cfg.custom_hooks[0]
        pipeline = cfg.train_dataloader.dataset.pipeline
        if hook.pop('fixed', True):
            cfg.train_dataloader.dataset.pipeline = [step for step in pipeline if step['type'] not in RANDOM]
    peft.update(dict(blocks='stage:3' if host == 'swin' else 'last:1', save_adapter=False), **hook)
    cfg.update(work_dir=str(work_dir), experiment_name=uuid.uuid4().hex, log_level='WARNING', visualizer=None)
    return cfg


def put_vit(cfg, task):
    """Put a plain ViT and a pyramid where the Swin was."""
    cfg.model.backbone = dict(
        _scope_='mmseg',
        type='VisionTransformer',
        img_size=(96, 128),
        patch_size=16,
        embed_dims=32,
        num_layers=2,
        num_heads=2,
        mlp_ratio=2,
        out_indices=(0, 1, 1, 1)[:2] if task == 'semantic' else (1,),
    )
    if task == 'detection':
        cfg.model.neck = dict(type='SimpleFPN', in_channels=32, out_channels=48, num_outs=4)
    elif task == 'depth':
        cfg.model.neck = dict(type='ViTPyramid', in_channels=32, out_channels=PYRAMID)
    else:  # two maps, of which the first comes from a frozen block
        head = cfg.model.decode_head
        head.update(in_channels=[32, 32], in_index=[0, 1])


def train(cfg):
    """Train; the state after it, and all scalars but times."""
    torch.manual_seed(0)
    runner = build_runner(cfg)
    runner.train()
    scalars = {
        name: [float(v) for v in buffer.data[0]]
        for name, buffer in runner.message_hub.log_scalars.items()
        if 'time' not in name and 'memory' not in name
    }
    return {name: value.clone() for name, value in runner.model.state_dict().items()}, scalars
