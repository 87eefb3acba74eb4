# DINOv2 ViT-L/14 (142 M images, no labels; Apache-2.0) with a linear head, on Food-101 at 224 x 224.
_base_ = ['./dinov2-small_linear_food101.py']

model = dict(
    backbone=dict(
        arch='large',
        init_cfg=dict(
            checkpoint='https://mmassets.onedl.ai/mmpretrain/v1.0/dinov2/'
            'vit-large-p14_dinov2-pre_3rdparty_20230426-f3302d9e.pth'
        ),
    ),
    head=dict(in_channels=1024),
)
