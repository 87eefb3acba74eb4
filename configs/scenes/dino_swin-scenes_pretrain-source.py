# Trains dino_swin-scenes_source.safetensors, the base of configs/comparison/detectors.yaml:
#   python tools/dataset_converters/make_scenes.py --out data/scenes_pretrain --styles source \
#       --formats coco --train 4000 --val 200 --seed 1
#   python tools/train.py configs/scenes/dino_swin-scenes_pretrain-source.py
#   python tools/export_backbone.py CHECKPOINT configs/scenes/dino_swin-scenes_source.safetensors --whole
_base_ = [
    '../_base_/models/dino_swin-scenes.py',
    '../_base_/datasets/scenes_boxes.py',
    '../_base_/schedules/scenes_600i.py',
    'mmdet::_base_/default_runtime.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

data_root = 'data/scenes_pretrain/source/coco/'
model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint='{{ fileDirname }}/swin-scenes_source.safetensors')),
)
train_dataloader = dict(batch_size=8, dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = dict(dataset=dict(data_root=data_root))
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

optim_wrapper = dict(optimizer=dict(lr=1e-3), paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.3)}))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=False, begin=100, end=2200),
]
train_cfg = dict(max_iters=2200, val_interval=550)
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=550, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
