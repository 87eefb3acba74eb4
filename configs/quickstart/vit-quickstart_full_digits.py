_base_ = ['./vit-quickstart_icon_digits.py']

custom_hooks = [dict(type='PEFTHook', method=dict(type='full'))]
optim_wrapper = dict(optimizer=dict(lr=3e-3))
