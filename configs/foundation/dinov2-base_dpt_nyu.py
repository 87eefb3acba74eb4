# DINOv2 ViT-B/14 with DPT for depth, on NYU-v2. Patches are resampled to 16, so that 480 x 640 divides.
_base_ = [
    '../_base_/models/depth_swin-base.py',
    '../_base_/datasets/nyu_480x640.py',
    '../_base_/schedules/depth_25k.py',
    'mmseg::_base_/default_runtime.py',
]

custom_imports = dict(imports=['iconformer_mm'], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_base_patch14_dinov2',
        checkpoint='https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth',
        out_indices=(2, 5, 8, 11),
        norm=True,
        prefix_tokens='cls',
        model_kwargs=dict(patch_size=16, img_size=480),
    ),
    decode_head=dict(
        _delete_=True,
        type='DPTDepthHead',
        embed_dims=768,
        channels=256,
        post_process_channels=[96, 192, 384, 768],
        readout_type='project',
        max_depth=10.0,
    ),
)
train_dataloader = dict(batch_size=3)
