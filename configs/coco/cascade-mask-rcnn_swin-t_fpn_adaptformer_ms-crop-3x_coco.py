_base_ = ['./cascade-mask-rcnn_swin-t_fpn_full_ms-crop-3x_coco.py', '../_base_/peft/adaptformer.py']
