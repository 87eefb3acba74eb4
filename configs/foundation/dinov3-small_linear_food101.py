# DINOv3 ViT-S/16 (1.7 G images, no labels) with a linear head on class token and mean, on Food-101 at 224 x 224.
# Licence: dinov3-license, which is not an open-source one. timm's copy of the weights is downloaded.
_base_ = [
    '../_base_/datasets/food101_bs128_224.py',
    '../_base_/schedules/adamw_100e.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='TIMMFeatures',
        model_name='vit_small_patch16_dinov3.lvd1689m',
        pretrained=True,
        norm=True,
        prefix_tokens='cls',
    ),
    neck=dict(type='TokenPooling'),
    head=dict(type='LinearClsHead', num_classes=101, in_channels=2 * 384, loss=dict(type='CrossEntropyLoss')),
)
