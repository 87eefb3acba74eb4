# Boxes of scenes: a small DINO, pre-trained on source scenes as a whole.
_base_ = [
    '../_base_/models/dino_swin-scenes.py',
    '../_base_/datasets/scenes_boxes.py',
    '../_base_/schedules/scenes_600i.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

load_from = '{{ fileDirname }}/../scenes/dino_swin-scenes_source.safetensors'
custom_hooks = [dict(type='PEFTHook', method=dict(type='full'))]
optim_wrapper = dict(
    optimizer=dict(lr=3e-4),
    paramwise_cfg=dict(adapter_lr_mult=10),  # the head is pre-trained, the adapters are new
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.05, by_epoch=False, begin=0, end=40),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=False, begin=40, end=400),
]
train_cfg = dict(max_iters=400, val_interval=400)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=400, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
