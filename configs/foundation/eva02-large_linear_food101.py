# EVA-02 ViT-L/14 (masked pre-training on 38 M images; MIT) with a linear head on the mean, on Food-101 at 224 x 224.
_base_ = ['./dinov3-small_linear_food101.py']

# The statistics of CLIP's images, which EVA-02 was trained with.
data_preprocessor = dict(mean=[122.771, 116.746, 104.094], std=[68.501, 66.632, 70.323])
model = dict(
    backbone=dict(model_name='eva02_large_patch14_224.mim_m38m', norm=False, prefix_tokens=None),
    head=dict(in_channels=1024),
)
