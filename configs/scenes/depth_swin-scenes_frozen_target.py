_base_ = ['./depth_swin-scenes_full_target.py']

custom_hooks = [dict(type='PEFTHook', method=dict(type='frozen'))]
