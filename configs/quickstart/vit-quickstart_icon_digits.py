_base_ = [
    '../_base_/models/vit-quickstart.py',
    '../_base_/datasets/digits-20shot_bs50.py',
    '../_base_/schedules/quickstart_70e.py',
    'mmpretrain::_base_/default_runtime.py',
]
custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint='{{ fileDirname }}/vit-quickstart_strokes.safetensors'),
    ),
    head=dict(num_classes=10),
)
custom_hooks = [dict(type='PEFTHook', method=dict(type='icon', bottleneck=16))]

default_hooks = dict(
    checkpoint=dict(interval=70, max_keep_ckpts=1),
    logger=dict(interval=20),
)
randomness = dict(seed=0)
