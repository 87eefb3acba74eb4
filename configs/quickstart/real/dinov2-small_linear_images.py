# A real DINOv2 ViT-S/14 with a linear head, for a folder of images with one folder a class; tools/quickstart_real.py
# gives the weights, the data and the method. 84 pixels are 6 x 6 patches.
_base_ = ['mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch='dinov2-small',
        img_size=518,
        patch_size=14,
        layer_scale_init_value=1e-5,
        out_type='cls_token',
        init_cfg=dict(type='Pretrained', checkpoint='dinov2-small_mmpretrain.safetensors'),
    ),
    head=dict(type='VisionTransformerClsHead', num_classes=10, in_channels=384, loss=dict(type='CrossEntropyLoss')),
)
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)

size = 84
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(size, size), interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(size, size), interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    dataset=dict(type='CustomDataset', data_root='data', data_prefix='train', pipeline=train_pipeline),
    sampler=dict(type='InfiniteSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=50,
    num_workers=0,
    dataset=dict(type='CustomDataset', data_root='data', data_prefix='test', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator

# Ours: 120 steps of 32 images.
optim_wrapper = dict(
    constructor='PEFTOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=10),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=10, end=120),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=120, val_interval=120)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    checkpoint=dict(by_epoch=False, interval=120, max_keep_ckpts=1),
    logger=dict(interval=10),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
