# Trains swin-scenes_source.safetensors, the base of the scene configs:
#   python tools/dataset_converters/make_scenes.py --out data/scenes_pretrain --styles source \
#       --formats ade20k --train 8000 --val 200 --seed 1
#   python tools/train.py configs/scenes/upernet_swin-scenes_pretrain-source.py
#   python tools/export_backbone.py CHECKPOINT configs/scenes/swin-scenes_source.safetensors --prefix backbone.
_base_ = [
    '../_base_/models/upernet_swin-scenes.py',
    '../_base_/datasets/scenes_semantic.py',
    '../_base_/schedules/scenes_600i.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

data_root = 'data/scenes_pretrain/source/ade20k'
train_dataloader = dict(batch_size=16, num_workers=1, persistent_workers=True, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))

optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=300),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=300, end=5000),
]
train_cfg = dict(max_iters=5000, val_interval=1000)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1000, max_keep_ckpts=1),
)
randomness = dict(seed=0)
