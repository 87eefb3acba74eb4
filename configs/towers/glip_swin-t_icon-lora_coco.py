# iConFormer on Swin, LoRA on BERT, and on the fusion layers in the head. All else is frozen.
_base_ = ['./glip_swin-t_full_coco.py']

custom_hooks = [
    dict(
        type='PEFTHook',
        methods=[
            dict(where='backbone', type='icon', bottleneck=64),
            dict(
                where=['language_model', 'bbox_head.head.dyhead_tower'],
                type='lora',
                rank=16,
                alpha=16,
                targets=['q', 'v', 'fc1', 'fc2'],
            ),
        ],
        freeze=['*'],
    )
]
# Full fine-tuning learns at 1e-5. Adapters start from zero, and learn at 1e-3.
optim_wrapper = dict(paramwise_cfg=dict(adapter_lr_mult=100))
