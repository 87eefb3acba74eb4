# Swin-B with ImageNet-21K weights and a linear head.
_base_ = ['mmpretrain::_base_/models/swin_transformer/base_224.py']
model = dict(
    backbone=dict(
        drop_path_rate=0.0,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/swin-transformer/convert/'
            'swin-base_3rdparty_in21k.pth',
            prefix='backbone.',
        ),
    ),
    head=dict(loss=dict(_delete_=True, type='CrossEntropyLoss')),
    train_cfg=None,
)
