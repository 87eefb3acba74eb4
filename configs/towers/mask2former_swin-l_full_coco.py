# Mask2Former with Swin-L on instances of COCO: MMDetection's recipe for Swin-T, with Swin-L and queries of its panoptic
# recipe.
_base_ = ['mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        pretrain_img_size=384,
        embed_dims=192,
        depths=[2, 2, 18, 2],
        num_heads=[6, 12, 24, 48],
        window_size=12,
        init_cfg=dict(
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window12_384_22k.pth'
        ),
    ),
    panoptic_head=dict(num_queries=200, in_channels=[192, 384, 768, 1536]),
)
# The rates of norms by their names are those of the 6 blocks in Swin-T's third stage.
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={f'backbone.stages.2.blocks.{block}.norm': dict(lr_mult=0.1, decay_mult=0.0) for block in range(18)}
    )
)
