_base_ = [
    '../_base_/models/vit-base-p16_mae.py',
    '../_base_/datasets/cifar100_bs128_224.py',
    '../_base_/schedules/adaptformer_100e.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(head=dict(num_classes=100))
