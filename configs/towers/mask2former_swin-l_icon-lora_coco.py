# iConFormer on Swin, LoRA on the pixel decoder and the Transformer decoder; the rest of the head is trained.
# Frozen decoders need weights: those that MMDetection trained on COCO's panoptic task, whose classes are others.
_base_ = ['./mask2former_swin-l_full_coco.py']

custom_hooks = [
    dict(
        type='PEFTHook',
        methods=[
            dict(where='backbone', type='icon', bottleneck=64),
            dict(
                where=['panoptic_head.pixel_decoder', 'panoptic_head.transformer_decoder'],
                type='lora',
                rank=16,
                alpha=16,
                targets=['q', 'v', 'fc1', 'fc2'],
            ),
        ],
    )
]
load_from = 'https://download.openmmlab.com/mmdetection/v3.0/mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_coco-panoptic/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_coco-panoptic_20220407_104949-82f8d28d.pth'  # noqa: E501
optim_wrapper = dict(paramwise_cfg=dict(adapter_lr_mult=10))
