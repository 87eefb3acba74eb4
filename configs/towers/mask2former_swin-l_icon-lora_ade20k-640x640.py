# iConFormer on Swin, LoRA on the pixel decoder and the Transformer decoder; the rest of the head is trained.
# Frozen decoders need weights: those that MMSegmentation trained on ADE20K. Name your own data set's classes.
_base_ = ['./mask2former_swin-l_full_ade20k-640x640.py']

custom_hooks = [
    dict(
        type='PEFTHook',
        methods=[
            dict(where='backbone', type='icon', bottleneck=64),
            dict(
                where=['decode_head.pixel_decoder', 'decode_head.transformer_decoder'],
                type='lora',
                rank=16,
                alpha=16,
                targets=['q', 'v', 'fc1', 'fc2'],
            ),
        ],
    )
]
load_from = 'https://download.openmmlab.com/mmsegmentation/v0.5/mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640_20221203_235933-7120c214.pth'  # noqa: E501
optim_wrapper = dict(paramwise_cfg=dict(adapter_lr_mult=10))
