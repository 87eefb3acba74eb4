_base_ = ['./mask-rcnn_swin-t_fpn_full_ms-crop-3x_coco.py', '../_base_/peft/frozen.py']
