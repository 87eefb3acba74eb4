# Swin V2-B (MMPretrain's) with ImageNet-21K weights and a deconvolution head.
_base_ = ['./depth_swin-base.py']
model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.SwinTransformerV2',
        arch='base',
        img_size=480,
        window_size=[15, 15, 15, 15],
        pretrained_window_sizes=[12, 12, 12, 6],
        pad_small_map=True,
        drop_path_rate=0.3,
        out_indices=(3,),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmclassification/v0/swin-v2/pretrain/'
            'swinv2-base-w12_3rdparty_in21k-192px_20220803-f7dc9763.pth',
            prefix='backbone.',
        ),
    ),
)
