# A ViT small enough for a laptop: 0.45 M parameters, 49 patches of 4 x 4 pixels.
model = dict(
    type='ImageClassifier',
    data_preprocessor=dict(mean=[40.0], std=[80.0]),
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=96, num_layers=4, num_heads=3, feedforward_channels=384),
        img_size=28,
        patch_size=4,
        in_channels=1,
        out_type='cls_token',
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=50,
        in_channels=96,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
)
