_base_ = [
    '../_base_/models/depth_swin-base.py',
    '../_base_/datasets/nyu_480x640.py',
    '../_base_/schedules/depth_25k.py',
    'mmseg::_base_/default_runtime.py',
]

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

train_dataloader = dict(batch_size=3)
