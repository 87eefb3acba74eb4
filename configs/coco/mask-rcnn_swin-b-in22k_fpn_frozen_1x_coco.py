_base_ = ['./mask-rcnn_swin-b-in22k_fpn_full_1x_coco.py', '../_base_/peft/frozen.py']
