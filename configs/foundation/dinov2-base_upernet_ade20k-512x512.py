# DINOv2 ViT-B/14 with UPerNet on a pyramid of four of its maps, on ADE20K.
_base_ = ['./dinov2-base_linear_ade20k-512x512.py']

model = dict(
    backbone=dict(out_indices=(2, 5, 8, 11)),
    neck=dict(type='ViTPyramid', in_channels=768, out_channels=(768, 768, 768, 768)),
    decode_head=dict(
        _delete_=True,
        type='UPerHead',
        in_channels=[768, 768, 768, 768],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
)
