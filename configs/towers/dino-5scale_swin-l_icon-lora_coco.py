# iConFormer on Swin, LoRA on the encoder and decoder; neck and head are trained.
# A frozen encoder and decoder need weights: those that MMDetection trained on COCO. Name your own data set's classes.
_base_ = ['./dino-5scale_swin-l_full_coco.py']

custom_hooks = [
    dict(
        type='PEFTHook',
        methods=[
            dict(where='backbone', type='icon', bottleneck=64),
            dict(where=['encoder', 'decoder'], type='lora', rank=16, alpha=16, targets=['q', 'v', 'fc1', 'fc2']),
        ],
    )
]
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/dino/dino-5scale_swin-l_8xb2-12e_coco/dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth'  # noqa: E501
optim_wrapper = dict(paramwise_cfg=dict(adapter_lr_mult=10))
