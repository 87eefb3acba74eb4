# LoRA on all towers: Swin, BERT, and the fusion layers in the head. All else is frozen.
_base_ = ['./glip_swin-t_full_coco.py']

custom_hooks = [
    dict(
        type='PEFTHook',
        method=dict(type='lora', rank=16, alpha=16, targets=['q', 'v', 'fc1', 'fc2']),
        where=['backbone', 'language_model', 'bbox_head.head.dyhead_tower'],
        freeze=['*'],
    )
]
# Full fine-tuning learns at 1e-5. Adapters start from zero, and learn at 1e-3.
optim_wrapper = dict(paramwise_cfg=dict(adapter_lr_mult=100))
