_base_ = ['./vit-quickstart_icon_digits.py']

custom_hooks = [dict(type='PEFTHook', method=dict(type='frozen'))]
