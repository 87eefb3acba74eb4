# Makes swin_source.safetensors, the base that all scene configs adapt:
#   python tools/dataset_converters/make_scenes.py --out data/scenes_pretrain --styles source \
#       --formats ade20k --train 6000 --val 200 --seed 1
#   python tools/train.py configs/scenes/upernet_swin_pretrain_source.py
#   python tools/export_backbone.py CHECKPOINT configs/scenes/swin_source.safetensors
_base_ = [
    '../_base_/models/scenes_upernet.py',
    '../_base_/datasets/scenes_ade20k.py',
    '../_base_/schedules/scenes.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

data_root = 'data/scenes_pretrain/source/ade20k'
train_dataloader = dict(batch_size=16, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader

param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=100, end=4000),
]
train_cfg = dict(max_iters=4000, val_interval=1000)
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1000, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
randomness = dict(seed=0)
