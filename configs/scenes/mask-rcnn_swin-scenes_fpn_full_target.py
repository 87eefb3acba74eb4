_base_ = [
    '../_base_/models/mask-rcnn_swin-scenes_fpn.py',
    '../_base_/datasets/scenes_instance.py',
    '../_base_/schedules/scenes_600i.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='{{ fileDirname }}/swin-scenes_source.safetensors')),
)
custom_hooks = [dict(type='PEFTHook', method=dict(type='full'))]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=600, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
randomness = dict(seed=0)
