# LoRA on all three towers: Swin, BERT, and the encoder and decoder. All else is frozen.
_base_ = ['./grounding-dino_swin-t_full_coco.py']

custom_hooks = [
    dict(
        type='PEFTHook',
        method=dict(type='lora', rank=16, alpha=16, targets=['q', 'v', 'fc1', 'fc2']),
        where=['backbone', 'language_model', 'encoder', 'decoder'],
        freeze=['*'],
    )
]
# Adapters learn at five times the rate of full fine-tuning, in every tower.
optim_wrapper = dict(paramwise_cfg=dict(adapter_lr_mult=5))
