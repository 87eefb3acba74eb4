# DINOv2 ViT-B/14 with Mask R-CNN on ViTDet's simple pyramid, on COCO (MMDetection's 1x schedule for Swin).
# The patch embedding is resampled to patches of 16, so that the strides are 4 to 64.
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py']

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_base_patch14_dinov2',
        checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth',
        norm=True,
        model_kwargs=dict(patch_size=16, img_size=512),
    ),
    neck=dict(_delete_=True, type='SimpleFPN', in_channels=768, out_channels=256, num_outs=5),
)
