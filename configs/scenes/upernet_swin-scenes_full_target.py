_base_ = [
    '../_base_/models/upernet_swin-scenes.py',
    '../_base_/datasets/scenes_semantic.py',
    '../_base_/schedules/scenes_800i.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='{{ fileDirname }}/swin-scenes_source.safetensors')),
)
custom_hooks = [dict(type='PEFTHook', method=dict(type='full'))]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=800, max_keep_ckpts=1),
)
# Pre-trained weights train at a tenth of the head's learning rate. Adapters train at the head's rate.
optim_wrapper = dict(
    optimizer=dict(lr=1e-2),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))),
)
randomness = dict(seed=0)
