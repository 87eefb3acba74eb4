# The Swin of the scene models with a deconvolution head.
model = dict(
    type='DepthEstimator',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=0,
        size=(96, 128),
    ),
    backbone=dict(
        type='SwinTransformer',
        embed_dims=24,
        depths=[2, 2, 2, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        drop_path_rate=0.0,
        out_indices=(3,),
    ),
    decode_head=dict(type='DepthDeconvHead', in_channels=192, max_depth=10.0),
    train_cfg=dict(),
    # Flip test on the whole image.
    test_cfg=dict(mode='slide_flip', crop_size=(96, 128), stride=(96, 128)),
)
