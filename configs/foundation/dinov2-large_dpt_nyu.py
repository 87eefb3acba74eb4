# DINOv2 ViT-L/14 with DPT for depth, on NYU-v2.
_base_ = ['./dinov2-base_dpt_nyu.py']

model = dict(
    backbone=dict(
        model_name='vit_large_patch14_dinov2',
        checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth',
        out_indices=(5, 11, 17, 23),
    ),
    decode_head=dict(embed_dims=1024, post_process_channels=[256, 512, 1024, 1024]),
)
