_base_ = ['./mask-rcnn_swin-scenes_fpn_full_target.py']

custom_hooks = [dict(type='PEFTHook', method=dict(type='frozen'))]
