_base_ = ['./scenes_600i.py']

param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=60),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=60, end=800),
]
train_cfg = dict(max_iters=800, val_interval=800)
