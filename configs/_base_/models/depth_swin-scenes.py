# The Swin backbone of the scene models with a deconvolution head.
_base_ = ['./depth_swin-base.py']

model = dict(
    data_preprocessor=dict(size=(96, 128)),
    backbone=dict(embed_dims=24, depths=[2, 2, 2, 1], num_heads=[1, 2, 4, 8], window_size=4, drop_path_rate=0.0),
    decode_head=dict(in_channels=192),
    test_cfg=dict(crop_size=(96, 128), stride=(96, 128)),
)
