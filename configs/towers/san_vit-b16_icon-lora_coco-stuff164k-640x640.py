# iConFormer on CLIP's image encoder, LoRA on its last layers and on the network beside it. All else is frozen.
# The text encoder takes no adapters: SAN runs it without gradients, once.
_base_ = ['./san_vit-b16_full_coco-stuff164k-640x640.py']

custom_hooks = [
    dict(
        type='PEFTHook',
        methods=[
            dict(where='image_encoder', type='icon', bottleneck=64),
            dict(
                where=['decode_head.side_adapter_network', 'decode_head.rec_with_attnbias'],
                type='lora',
                rank=16,
                alpha=16,
                targets=['q', 'v', 'fc1', 'fc2'],
            ),
        ],
        freeze=['*'],
    )
]
load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/san/san-vit-b16_20230906-fd0a7684.pth'
optim_wrapper = dict(paramwise_cfg=dict(adapter_lr_mult=10))
