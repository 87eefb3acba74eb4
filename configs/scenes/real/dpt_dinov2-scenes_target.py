# A real DINOv2 ViT-S/14 with DPT for depth on the target scenes, for configs/comparison/dinov2_scenes.yaml, which names
# the weights. Images are enlarged to 9 x 12 patches of 14 pixels.
_base_ = [
    '../../_base_/models/depth_swin-base.py',
    '../../_base_/datasets/scenes_depth.py',
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
        prefix_tokens='cls',
        init_cfg=dict(type='Pretrained', checkpoint='dinov2-small_timm.safetensors'),
    ),
    decode_head=dict(
        _delete_=True,
        type='DPTDepthHead',
        embed_dims=384,
        channels=64,
        post_process_channels=[48, 96, 192, 384],
        readout_type='project',
        max_depth=10.0,
    ),
    test_cfg=dict(_delete_=True, mode='whole'),
)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadDepthAnnotation', depth_rescale_factor=1e-3),
            dict(type='Resize', scale=size, keep_ratio=False),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackSegInputs', meta_keys={{_base_.meta_keys}}),
        ],
    ),
)
# Depth is loaded after the resizing, so that scores are taken at the images' own size.
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=size, keep_ratio=False),
            dict(type='LoadDepthAnnotation', depth_rescale_factor=1e-3),
            dict(type='PackSegInputs', meta_keys={{_base_.meta_keys}}),
        ],
    ),
)
test_dataloader = val_dataloader
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=600, max_keep_ckpts=1),
)
