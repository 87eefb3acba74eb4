# Ours: 200 iterations. Pre-trained weights that are tuned train at a twentieth of the rate of what is new.
_base_ = ['./scenes_600i.py']

optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.05))),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=20, end=200),
]
train_cfg = dict(max_iters=200, val_interval=200)
custom_hooks = [dict(type='PEFTHook', method=dict(type='full'))]
randomness = dict(seed=0)
