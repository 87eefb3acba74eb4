_base_ = ['./upernet_swin-scenes_full_target.py']

custom_hooks = [dict(type='PEFTHook', method=dict(type='adaptformer', bottleneck=16, scale=1.0, dropout=0.0))]
optim_wrapper = dict(optimizer=dict(lr=3e-2))
