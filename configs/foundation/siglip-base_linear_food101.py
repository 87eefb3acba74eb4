# SigLIP ViT-B/16, its image encoder (image-text pairs; Apache-2.0), with a linear head on the mean, on Food-101.
_base_ = ['./dinov3-small_linear_food101.py']

data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
model = dict(
    backbone=dict(model_name='vit_base_patch16_siglip_224.webli', prefix_tokens=None),
    head=dict(in_channels=768),
)
