_base_ = ['./vit-quickstart_icon_digits.py']

custom_hooks = [dict(type='PEFTHook', method=dict(type='adaptformer', bottleneck=16, scale=1.0, dropout=0.0))]
optim_wrapper = dict(optimizer=dict(lr=3e-3))
