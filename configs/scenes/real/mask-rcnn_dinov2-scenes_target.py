# A real DINOv2 ViT-S/14 with Mask R-CNN on ViTDet's pyramid on the target scenes, for
# configs/comparison/dinov2_scenes.yaml, which names the weights. Images are enlarged to 9 x 12 patches of 14 pixels, so
# the strides are 3.5 to 28.
_base_ = [
    '../../_base_/models/mask-rcnn_swin-scenes_fpn.py',
    '../../_base_/datasets/scenes_instance.py',
    'mmdet::_base_/default_runtime.py',
    '../../_base_/schedules/dinov2-scenes_600i.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

size = (168, 126)  # width, height
strides = [3.5, 7, 14, 28]
model = dict(
    data_preprocessor=dict(pad_size_divisor=14),
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_small_patch14_dinov2',
        norm=True,
        init_cfg=dict(type='Pretrained', checkpoint='dinov2-small_timm.safetensors'),
    ),
    neck=dict(_delete_=True, type='SimpleFPN', in_channels=384, out_channels=64, num_outs=4),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(strides=strides)),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=64,
            featmap_strides=strides,
            roi_layer=dict(sampling_ratio=1),
        ),
        bbox_head=dict(in_channels=64),
        mask_roi_extractor=dict(
            out_channels=64,
            featmap_strides=strides,
            roi_layer=dict(sampling_ratio=1),
        ),
        mask_head=dict(in_channels=64, conv_out_channels=64),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100)),
)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='Resize', scale=size, keep_ratio=False),
            dict(type='RandomFlip', prob=0.5),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackDetInputs'),
        ],
    ),
)
val_dataloader = dict(
    dataset=dict(
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=size, keep_ratio=False),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ],
    ),
)
test_dataloader = val_dataloader
log_processor = dict(by_epoch=False)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=600, max_keep_ckpts=1),
)
