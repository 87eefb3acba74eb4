# DINOv2 ViT-B/14 with Mask2Former, on COCO: MMDetection's config for Swin-T, whose channels the pyramid has.
_base_ = ['mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_base_patch14_dinov2',
        checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth',
        out_indices=(2, 5, 8, 11),
        norm=True,
        model_kwargs=dict(patch_size=16, img_size=512),
    ),
    neck=dict(type='ViTPyramid', in_channels=768, out_channels=(96, 192, 384, 768)),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        _delete_=True,
        custom_keys=dict(
            backbone=dict(lr_mult=0.1),
            query_embed=dict(decay_mult=0.0),
            query_feat=dict(decay_mult=0.0),
            level_embed=dict(decay_mult=0.0),
        ),
        norm_decay_mult=0.0,
    )
)
