_base_ = ['./mask-rcnn_swin-t_fpn_full_1x_coco.py', '../_base_/peft/icon.py']
