_base_ = [
    '../_base_/models/swin-base_in21k.py',
    '../_base_/datasets/food101_bs128_224.py',
    '../_base_/schedules/adamw_100e.py',
    'mmpretrain::_base_/default_runtime.py',
]

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(head=dict(num_classes=101))
# Fine-tuning a whole Transformer needs a lower rate than training adapters and heads (ours).
optim_wrapper = dict(optimizer=dict(lr=5e-5))
