# Trains vit-quickstart_strokes.safetensors, the base of the quickstart configs:
#   python tools/train.py configs/quickstart/vit-quickstart_pretrain-strokes.py
#   python tools/export_backbone.py CHECKPOINT configs/quickstart/vit-quickstart_strokes.safetensors
_base_ = [
    '../_base_/models/vit-quickstart.py',
    '../_base_/datasets/strokes_bs128.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=1, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=15, val_interval=5)
val_cfg = dict()
test_cfg = dict()

default_hooks = dict(
    checkpoint=dict(interval=5, max_keep_ckpts=1),
    logger=dict(interval=50),
)
randomness = dict(seed=0)
