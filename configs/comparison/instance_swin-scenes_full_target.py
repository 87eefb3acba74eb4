# Instance segmentation of scenes in a minute and a half: half the images per step, one sample per bin in RoIAlign.
_base_ = '../scenes/mask-rcnn_swin-scenes_fpn_full_target.py'

model = dict(
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=1)),
        mask_roi_extractor=dict(roi_layer=dict(sampling_ratio=1)),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=100)),
)
train_dataloader = dict(batch_size=2)
