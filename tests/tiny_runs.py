"""Trainings of seconds: MMPretrain on drawn strokes, with a PEFTHook."""

import uuid

from families import VIT
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

import iconformer_mm  # noqa: F401


def config(work_dir, **changes):
    """An ordinary mmpretrain config that knows nothing of us."""
    pipeline = [dict(type='PackInputs')]
    data = dict(
        batch_size=5,
        num_workers=0,
        dataset=dict(type='Strokes', num_images=20, num_classes=4, image_size=32, pipeline=pipeline),
        sampler=dict(type='DefaultSampler', shuffle=True),
    )
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                data_preprocessor=dict(mean=[0.0], std=[255.0]),
                backbone=dict(type='VisionTransformer', arch=VIT, img_size=32, patch_size=8, in_channels=1),
                head=dict(type='LinearClsHead', num_classes=4, in_channels=32),
            ),
            train_dataloader=data,
            val_dataloader=data,
            test_dataloader=data,
            val_evaluator=dict(type='Accuracy'),
            test_evaluator=dict(type='Accuracy'),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            val_cfg=dict(),
            test_cfg=dict(),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-2, weight_decay=0.1)),
            param_scheduler=[dict(type='MultiStepLR', by_epoch=True, milestones=[1], gamma=0.1)],
            custom_hooks=[dict(type='PEFTHook', method=dict(type='icon', bottleneck=8))],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            randomness=dict(seed=0),
            work_dir=str(work_dir),
            log_level='WARNING',
            visualizer=None,
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


def build(work_dir, **changes):
    cfg = config(work_dir, **changes)
    cfg.experiment_name = uuid.uuid4().hex
    init_default_scope('mmpretrain')
    return Runner.from_cfg(cfg)
