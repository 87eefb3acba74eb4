"""Small segmentors with Transformers beyond the backbone, on noise with two classes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from small_detectors import MASK2FORMER as DETECTOR
from small_detectors import SWIN, WIDTH
from torch import Tensor, nn

CLASSES = ('circle', 'square', 'triangle')
_PREPROCESSOR = dict(
    type='SegDataPreProcessor', pad_val=0, seg_pad_val=255, size=(64, 96), test_cfg=dict(size_divisor=32)
)


def _of_mmdet(node: Any) -> Any:
    """Name the registry of losses, costs and modules of MMDetection, as MMSegmentation's configs do."""
    if isinstance(node, dict):
        foreign = 'type' in node and node['type'].endswith(('Loss', 'Cost', 'Assigner', 'Sampler', 'PixelDecoder'))
        changed = {key: _of_mmdet(value) for key, value in node.items()}
        return {**changed, 'type': f'mmdet.{node["type"]}'} if foreign else changed
    return [_of_mmdet(value) for value in node] if isinstance(node, list) else node


_MASKS = {k: v for k, v in DETECTOR['panoptic_head'].items() if k not in ('num_things_classes', 'num_stuff_classes')}
MASK2FORMER = dict(
    type='EncoderDecoder',
    data_preprocessor=_PREPROCESSOR,
    backbone={**SWIN, 'out_indices': (0, 1, 2, 3)},
    decode_head={
        **_of_mmdet(_MASKS),
        'type': 'Mask2FormerHead',
        'num_classes': 3,
        'align_corners': False,
        'train_cfg': _of_mmdet(DETECTOR['train_cfg']),
    },
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
_VIT = dict(
    type='VisionTransformer',
    img_size=(64, 96),
    patch_size=16,
    embed_dims=WIDTH,
    num_layers=2,
    num_heads=2,
    mlp_ratio=2,
    interpolate_mode='bicubic',
)
SEGMENTER = dict(
    type='EncoderDecoder',
    data_preprocessor=_PREPROCESSOR,
    backbone=dict(**_VIT, final_norm=True, with_cls_token=True),
    decode_head=dict(
        type='SegmenterMaskTransformerHead',
        in_channels=WIDTH,
        channels=WIDTH,
        num_classes=3,
        num_layers=2,
        num_heads=2,
        embed_dims=WIDTH,
        drop_path_rate=0.0,
        dropout_ratio=0.0,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)


def san(**recognition: Any) -> dict[str, Any]:
    """SAN, whose text encoder reads two class names.

    Args:
        **recognition: Options of the layers that recognise the masks.
    """
    costs = [
        dict(type='ClassificationCost', weight=2.0),
        dict(type='CrossEntropyLossCost', weight=5.0, use_sigmoid=True),
        dict(type='DiceCost', weight=5.0, pred_act=True, eps=1.0),
    ]
    return dict(
        type='MultimodalEncoderDecoder',
        data_preprocessor=_PREPROCESSOR,
        asymetric_input=True,
        encoder_resolution=0.5,
        image_encoder=dict(
            **{**_VIT, 'img_size': (32, 48)},
            patch_pad=0,
            patch_bias=False,
            pre_norm=True,
            with_cls_token=True,
            out_origin=True,
            output_cls_token=True,
            out_indices=(0, 1),
            norm_cfg=dict(type='LN', eps=1e-5),
            act_cfg=dict(type='QuickGELU'),
            frozen_exclude=['pos_embed'],
        ),
        text_encoder=dict(
            type='CLIPTextEncoder',
            vocabulary=list(CLASSES),
            templates=['a {}.'],
            context_length=77,
            embed_dims=16,
            num_layers=1,
            num_heads=2,
            mlp_ratio=2,
            output_dims=16,
            norm_cfg=dict(type='LN', eps=1e-5),
        ),
        decode_head=dict(
            type='SideAdapterCLIPHead',
            num_classes=3,
            deep_supervision_idxs=[1],
            san_cfg=dict(
                in_channels=3,
                clip_channels=WIDTH,
                embed_dims=24,
                num_queries=4,
                fusion_index=[0, 1, 2],
                cfg_encoder=dict(num_encode_layer=2, num_heads=2, mlp_ratio=2),
                cfg_decoder=dict(
                    num_heads=2, num_layers=1, embed_channels=16, mlp_channels=16, num_mlp=2, rescale=True
                ),
            ),
            maskgen_cfg=dict(
                sos_token_format='cls_token',
                sos_token_num=4,
                num_layers=2,
                embed_dims=WIDTH,
                num_heads=2,
                mlp_ratio=2,
                out_dims=16,
                act_cfg=dict(type='QuickGELU'),
                norm_cfg=dict(type='LN', eps=1e-5),
                **recognition,
            ),
            align_corners=False,
            train_cfg=dict(
                num_points=64,
                oversample_ratio=3.0,
                importance_sample_ratio=0.75,
                assigner=dict(type='HungarianAssigner', match_costs=costs),
            ),
            loss_decode=[
                dict(type='CrossEntropyLoss', loss_name='loss_cls_ce', loss_weight=2.0, class_weight=[1.0] * 3 + [0.1]),
                dict(type='CrossEntropyLoss', use_sigmoid=True, loss_name='loss_mask_ce', loss_weight=5.0),
                dict(
                    type='DiceLoss',
                    ignore_index=None,
                    naive_dice=True,
                    eps=1,
                    loss_name='loss_mask_dice',
                    loss_weight=5.0,
                ),
            ],
        ),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )


def build(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Build a segmentor with random weights, in evaluation mode."""
    import mmdet.models  # noqa: F401 - Mask2Former is made of its modules
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    torch.manual_seed(seed)
    model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    if config['type'] == 'MultimodalEncoderDecoder':  # it asks for a file of CLIP's weights
        model.decode_head.side_adapter_network.init_weights()
        for parameter in model.text_encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    else:
        model.init_weights()
    logger.setLevel(level)
    return model.eval()


def batch(size: tuple[int, int] = (64, 96)) -> dict[str, Any]:
    """Two images of noise with two rectangles each, as the data loader gives them."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    random = torch.Generator().manual_seed(7)
    images, samples = [], []
    for number in range(2):
        images.append(torch.randint(0, 256, (3, *size), generator=random, dtype=torch.uint8))
        labels = torch.zeros(1, *size, dtype=torch.long)
        labels[:, 6 : 44 + number, 4:40] = 1
        labels[:, 20:60, 48 + number : 80] = 2
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size, img_path=f'{number}.png')
        samples.append(SegDataSample(metainfo=meta, gt_sem_seg=PixelData(data=labels)))
    return dict(inputs=images, data_samples=samples)


@torch.no_grad()
def predict(model: nn.Module, data: dict[str, Any]) -> list[Tensor]:
    """The logits of all images."""
    model.eval()
    torch.manual_seed(0)
    return [sample.seg_logits.data for sample in model.test_step(copy.deepcopy(data))]


def losses(model: nn.Module, data: dict[str, Any]) -> Tensor:
    """The sum of the losses in training mode; the same noise in each call."""
    model.train()
    torch.manual_seed(0)
    prepared = model.data_preprocessor(copy.deepcopy(data), True)
    total, _ = model.parse_losses(model(**prepared, mode='loss'))
    return total
