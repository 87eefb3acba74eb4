# DINOv2 ViT-S/14 (142 M images, no labels; Apache-2.0) with a linear head, on Food-101 at 224 x 224.
_base_ = [
    '../_base_/datasets/food101_bs128_224.py',
    '../_base_/schedules/adamw_100e.py',
    'mmpretrain::_base_/default_runtime.py',
]

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
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://mmassets.onedl.ai/mmpretrain/v1.0/dinov2/'
            'vit-small-p14_dinov2-pre_3rdparty_20230426-5641ca5a.pth',
            prefix='backbone.',
        ),
    ),
    head=dict(type='VisionTransformerClsHead', num_classes=101, in_channels=384, loss=dict(type='CrossEntropyLoss')),
)
