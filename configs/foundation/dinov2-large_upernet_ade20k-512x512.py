# DINOv2 ViT-L/14 with UPerNet on a pyramid of four of its maps, on ADE20K.
_base_ = ['./dinov2-base_upernet_ade20k-512x512.py']

model = dict(
    backbone=dict(
        model_name='vit_large_patch14_dinov2',
        checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth',
        out_indices=(5, 11, 17, 23),
    ),
    neck=dict(in_channels=1024),
)
