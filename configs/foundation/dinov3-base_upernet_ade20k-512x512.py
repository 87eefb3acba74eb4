# DINOv3 ViT-B/16 with UPerNet on a pyramid of four of its maps, on ADE20K. Licence: dinov3-license.
_base_ = ['./dinov2-base_upernet_ade20k-512x512.py']

model = dict(
    backbone=dict(
        model_name='vit_base_patch16_dinov3.lvd1689m',
        pretrained=True,
        checkpoint=None,
        model_kwargs=dict(_delete_=True),
    ),
)
