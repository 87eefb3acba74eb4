_base_ = [
    '../_base_/models/cascade-mask-rcnn_swin-t_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/coco_swin_1x.py',
    'mmdet::_base_/default_runtime.py',
]

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)
