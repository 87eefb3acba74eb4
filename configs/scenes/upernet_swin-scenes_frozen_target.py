_base_ = ['./upernet_swin-scenes_full_target.py']

custom_hooks = [dict(type='PEFTHook', method=dict(type='frozen'))]
optim_wrapper = dict(optimizer=dict(lr=3e-2))
