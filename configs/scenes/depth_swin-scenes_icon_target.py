_base_ = ['./depth_swin-scenes_full_target.py']

custom_hooks = [dict(type='PEFTHook', method=dict(type='icon', bottleneck=16))]
optim_wrapper = dict(optimizer=dict(lr=1e-2))
