# DINOv2 ViT-B/14 (142 M images, no labels; Apache-2.0) with a linear head, on Food-101 at 224 x 224.
_base_ = ['./dinov2-small_linear_food101.py']

model = dict(
    backbone=dict(
        arch='base',
        init_cfg=dict(
            checkpoint='https://mmassets.onedl.ai/mmpretrain/v1.0/dinov2/'
            'vit-base-p14_dinov2-pre_3rdparty_20230426-ba246503.pth'
        ),
    ),
    head=dict(in_channels=768),
)
