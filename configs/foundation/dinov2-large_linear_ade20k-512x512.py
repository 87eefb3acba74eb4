# DINOv2 ViT-L/14 with the linear head of its evaluation, on ADE20K.
_base_ = ['./dinov2-base_linear_ade20k-512x512.py']

model = dict(
    backbone=dict(
        model_name='vit_large_patch14_dinov2',
        checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth',
    ),
    decode_head=dict(in_channels=1024),
)
