# MM-Grounding-DINO Swin-B on COCO, closed set: MMDetection's fine-tuning recipe for Swin-T, with its Swin-B.
_base_ = ['./grounding-dino_swin-t_full_coco.py']

model = dict(
    backbone=dict(
        pretrain_img_size=384,
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        window_size=12,
        drop_path_rate=0.3,
        with_cp=True,
        init_cfg=None,
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/mm_grounding_dino/grounding_dino_swin-b_pretrain_all/grounding_dino_swin-b_pretrain_all-f9818a7c.pth'  # noqa: E501
