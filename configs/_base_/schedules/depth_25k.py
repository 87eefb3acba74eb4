# Ours, similar to MIM-Depth: AdamW, 25,000 iterations of 24 images, one cycle of warm-up
# and decay. This is about 25 epochs of the 24,231 training images.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.06, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=3e-5, power=0.9, begin=1500, end=25000, by_epoch=False),
]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=25000, val_interval=2500)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(
        type='CheckpointHook', by_epoch=False, interval=2500, save_best='rmse', rule='less', max_keep_ckpts=1
    ),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
auto_scale_lr = dict(enable=False, base_batch_size=24)
