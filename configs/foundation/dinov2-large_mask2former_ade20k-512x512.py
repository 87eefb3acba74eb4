# DINOv2 ViT-L/14 with Mask2Former, on ADE20K: MMSegmentation's config for Swin-L, whose channels the pyramid has.
_base_ = ['mmseg::mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_large_patch14_dinov2',
        checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth',
        out_indices=(5, 11, 17, 23),
        norm=True,
        model_kwargs=dict(patch_size=16, img_size=640),
    ),
    neck=dict(type='ViTPyramid', in_channels=1024, out_channels=(192, 384, 768, 1536)),
)
# The rates of Swin's norms and positions by their names are not for this backbone.
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
