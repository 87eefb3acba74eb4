# Ours: as for the scenes' Swin. Pre-trained weights that are tuned train at a twentieth of the rate of what is new.
_base_ = ['./scenes_600i.py']

optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.05))),
)
custom_hooks = [dict(type='PEFTHook', method=dict(type='full'))]
randomness = dict(seed=0)
