# DINOv3 ViT-L/16 (1.7 G images, no labels) with a linear head on class token and mean, on Food-101 at 224 x 224.
_base_ = ['./dinov3-small_linear_food101.py']

model = dict(backbone=dict(model_name='vit_large_patch16_dinov3.lvd1689m'), head=dict(in_channels=2 * 1024))
