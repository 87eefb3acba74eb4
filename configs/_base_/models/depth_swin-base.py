# Swin-B with ImageNet-22K weights and a deconvolution head for depth up to 10 m.
model = dict(
    type='DepthEstimator',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=0,
        size=(480, 480),
    ),
    backbone=dict(
        type='SwinTransformer',
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=7,
        drop_path_rate=0.3,
        out_indices=(3,),
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/swin/'
            'swin_base_patch4_window7_224_22k_20220317-4f79f7c0.pth',
        ),
    ),
    decode_head=dict(type='DepthDeconvHead', in_channels=1024, max_depth=10.0),
    train_cfg=dict(),
    # Test on the whole image and its mirror image.
    test_cfg=dict(mode='slide_flip', crop_size=(480, 640), stride=(480, 640)),
)
