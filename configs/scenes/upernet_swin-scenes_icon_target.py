_base_ = ['./upernet_swin-scenes_full_target.py']

custom_hooks = [dict(type='PEFTHook', method=dict(type='icon', bottleneck=16))]
