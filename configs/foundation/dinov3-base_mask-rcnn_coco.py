# DINOv3 ViT-B/16 with Mask R-CNN on ViTDet's simple pyramid, on COCO. Licence: dinov3-license.
_base_ = ['./dinov2-base_mask-rcnn_coco.py']

model = dict(
    backbone=dict(
        model_name='vit_base_patch16_dinov3.lvd1689m',
        pretrained=True,
        checkpoint=None,
        model_kwargs=dict(_delete_=True),
    ),
)
