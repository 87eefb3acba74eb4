# iConFormer on Swin, LoRA on BERT, and on the encoder and decoder. All else is frozen.
_base_ = ['./grounding-dino_swin-b_full_coco.py']

custom_hooks = [
    dict(
        type='PEFTHook',
        methods=[
            dict(where='backbone', type='icon', bottleneck=64),
            dict(
                where=['language_model', 'encoder', 'decoder'],
                type='lora',
                rank=16,
                alpha=16,
                targets=['q', 'v', 'fc1', 'fc2'],
            ),
        ],
        freeze=['*'],
    )
]
# Adapters learn at five times the rate of full fine-tuning, in every tower.
optim_wrapper = dict(paramwise_cfg=dict(adapter_lr_mult=5))
