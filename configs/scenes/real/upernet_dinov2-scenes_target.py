# A real DINOv2 ViT-S/14 with UPerNet on the target scenes, for configs/comparison/dinov2_scenes.yaml, which names the
# weights. Images are enlarged to 9 x 12 patches of 14 pixels.
_base_ = [
    '../../_base_/models/upernet_swin-scenes.py',
    '../../_base_/datasets/scenes_semantic.py',
    'mmseg::_base_/default_runtime.py',
    '../../_base_/schedules/dinov2-scenes_600i.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

size = (168, 126)  # width, height
model = dict(
    data_preprocessor=dict(size=(126, 168)),
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_small_patch14_dinov2',
        out_indices=(2, 5, 8, 11),
        norm=True,
        init_cfg=dict(type='Pretrained', checkpoint='dinov2-small_timm.safetensors'),
    ),
    neck=dict(type='ViTPyramid', in_channels=384, out_channels=(96, 96, 96, 96)),
    decode_head=dict(in_channels=[96, 96, 96, 96], channels=96),
)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations'),
            dict(type='Resize', scale=size, keep_ratio=False),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackSegInputs'),
        ],
    ),
)
# Labels are loaded after the resizing, so that scores are taken at the images' own size.
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=size, keep_ratio=False),
            dict(type='LoadAnnotations'),
            dict(type='PackSegInputs'),
        ],
    ),
)
test_dataloader = val_dataloader
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=600, max_keep_ckpts=1),
)
