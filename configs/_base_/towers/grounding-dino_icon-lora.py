# iConFormer on the backbone, LoRA on BERT, and on the encoder and decoder. All else is frozen.
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
