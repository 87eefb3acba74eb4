"""Small detectors with Transformers beyond the backbone, on noise with boxes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.logging import MMLogger
from torch import Tensor, nn

WIDTH = 32
SWIN = dict(
    type='SwinTransformer',
    embed_dims=8,
    depths=[1, 1, 1, 1],
    num_heads=[1, 1, 2, 2],
    window_size=4,
    drop_path_rate=0.0,
    out_indices=(1, 2, 3),
)
_ATTENTION = dict(embed_dims=WIDTH, num_heads=4, dropout=0.0)
_DEFORMABLE = dict(embed_dims=WIDTH, num_heads=4, num_levels=4, num_points=2, dropout=0.0)
_FFN = dict(embed_dims=WIDTH, feedforward_channels=48, ffn_drop=0.0)
_LOSSES = dict(
    loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
    loss_bbox=dict(type='L1Loss', loss_weight=5.0),
    loss_iou=dict(type='GIoULoss', loss_weight=2.0),
)
_COSTS = [
    dict(type='FocalLossCost', weight=2.0),
    dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
    dict(type='IoUCost', iou_mode='giou', weight=2.0),
]
_COMMON: dict[str, Any] = dict(
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=1),
    backbone=SWIN,
    neck=dict(
        type='ChannelMapper',
        in_channels=[16, 32, 64],
        kernel_size=1,
        out_channels=WIDTH,
        act_cfg=None,
        norm_cfg=dict(type='GN', num_groups=8),
        num_outs=4,
    ),
    positional_encoding=dict(num_feats=WIDTH // 2, normalize=True, offset=-0.5),
    train_cfg=dict(assigner=dict(type='HungarianAssigner', match_costs=_COSTS)),
    test_cfg=dict(max_per_img=5),
)
_LEVEL_LAYERS: dict[str, Any] = dict(
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=_DEFORMABLE, ffn_cfg=_FFN)),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(self_attn_cfg=_ATTENTION, cross_attn_cfg=_DEFORMABLE, ffn_cfg=_FFN),
        post_norm_cfg=None,
    ),
)
DEFORMABLE_DETR = dict(
    **_COMMON,
    **_LEVEL_LAYERS,
    type='DeformableDETR',
    num_queries=6,
    num_feature_levels=4,
    with_box_refine=True,
    as_two_stage=False,
    bbox_head=dict(type='DeformableDETRHead', num_classes=3, embed_dims=WIDTH, sync_cls_avg_factor=True, **_LOSSES),
)
DINO = dict(
    **{**_COMMON, 'positional_encoding': dict(num_feats=WIDTH // 2, normalize=True, offset=0.0, temperature=20)},
    **_LEVEL_LAYERS,
    type='DINO',
    num_queries=6,
    with_box_refine=True,
    as_two_stage=True,
    bbox_head=dict(type='DINOHead', num_classes=3, embed_dims=WIDTH, sync_cls_avg_factor=True, **_LOSSES),
    dn_cfg=dict(
        label_noise_scale=0.5,
        box_noise_scale=1.0,
        group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=4),
    ),
)
_ONE_LEVEL = {
    **_COMMON,
    'backbone': {**SWIN, 'out_indices': (3,)},
    'neck': {**_COMMON['neck'], 'in_channels': [64], 'num_outs': 1},
    'positional_encoding': dict(num_feats=WIDTH // 2, normalize=True),
}
DETR = dict(
    **{
        **_ONE_LEVEL,
        'train_cfg': dict(
            assigner=dict(
                type='HungarianAssigner', match_costs=[dict(type='ClassificationCost', weight=1.0), *_COSTS[1:]]
            )
        ),
    },
    type='DETR',
    num_queries=6,
    encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=_ATTENTION, ffn_cfg=_FFN)),
    decoder=dict(
        num_layers=2,
        return_intermediate=True,
        layer_cfg=dict(self_attn_cfg=_ATTENTION, cross_attn_cfg=_ATTENTION, ffn_cfg=_FFN),
    ),
    bbox_head=dict(
        type='DETRHead',
        num_classes=3,
        embed_dims=WIDTH,
        **{**_LOSSES, 'loss_cls': dict(type='CrossEntropyLoss', bg_cls_weight=0.1, class_weight=1.0)},
    ),
)


def _wide(node: Any) -> Any:
    """Change the width of tokens to the 256 that Conditional DETR and Grounding DINO are written for."""
    if isinstance(node, dict):
        widths = dict(out_channels=256, num_feats=128)
        if 'ffn_cfg' not in node and node.get('type') != 'SwinTransformer':
            widths['embed_dims'] = 256
        return {key: widths.get(key, _wide(value)) for key, value in node.items()}
    return node


CONDITIONAL_DETR = _wide(
    dict(
        **_ONE_LEVEL,
        type='ConditionalDETR',
        num_queries=6,
        encoder=DETR['encoder'],
        decoder=dict(
            num_layers=2,
            return_intermediate=True,
            layer_cfg=dict(
                self_attn_cfg=dict(embed_dims=WIDTH, num_heads=4, cross_attn=False),
                cross_attn_cfg=dict(embed_dims=WIDTH, num_heads=4, cross_attn=True),
                ffn_cfg=_FFN,
            ),
        ),
        bbox_head=dict(type='ConditionalDETRHead', num_classes=3, embed_dims=WIDTH, **_LOSSES),
    )
)
_PRELU = dict(type='PReLU')
DAB_DETR = dict(
    **_ONE_LEVEL,
    type='DABDETR',
    num_queries=6,
    with_random_refpoints=False,
    num_patterns=0,
    encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=_ATTENTION, ffn_cfg=dict(**_FFN, act_cfg=_PRELU))),
    decoder=dict(
        num_layers=2,
        query_dim=4,
        query_scale_type='cond_elewise',
        with_modulated_hw_attn=True,
        return_intermediate=True,
        layer_cfg=dict(
            self_attn_cfg=dict(embed_dims=WIDTH, num_heads=4, cross_attn=False),
            cross_attn_cfg=dict(embed_dims=WIDTH, num_heads=4, cross_attn=True),
            ffn_cfg=dict(**_FFN, act_cfg=_PRELU),
        ),
    ),
    bbox_head=dict(type='DABDETRHead', num_classes=3, embed_dims=WIDTH, **_LOSSES),
)
DDQ = {
    **DINO,
    'type': 'DDQDETR',
    'dense_topk_ratio': 1.5,
    'dqs_cfg': dict(type='nms', iou_threshold=0.8),
    'bbox_head': {**DINO['bbox_head'], 'type': 'DDQDETRHead'},
}
_MASK_COSTS = [
    dict(type='ClassificationCost', weight=2.0),
    dict(type='CrossEntropyLossCost', weight=5.0, use_sigmoid=True),
    dict(type='DiceCost', weight=5.0, pred_act=True, eps=1.0),
]
MASK2FORMER = dict(
    type='Mask2Former',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=1, pad_mask=True),
    backbone={**SWIN, 'out_indices': (0, 1, 2, 3)},
    panoptic_head=dict(
        type='Mask2FormerHead',
        in_channels=[8, 16, 32, 64],
        strides=[4, 8, 16, 32],
        feat_channels=WIDTH,
        out_channels=WIDTH,
        num_things_classes=3,
        num_stuff_classes=0,
        num_queries=5,
        num_transformer_feat_level=3,
        pixel_decoder=dict(
            type='MSDeformAttnPixelDecoder',
            num_outs=3,
            norm_cfg=dict(type='GN', num_groups=8),
            act_cfg=dict(type='ReLU'),
            encoder=dict(
                num_layers=1,
                layer_cfg=dict(self_attn_cfg=dict(**{**_DEFORMABLE, 'num_levels': 3}, batch_first=True), ffn_cfg=_FFN),
            ),
            positional_encoding=dict(num_feats=WIDTH // 2, normalize=True),
        ),
        positional_encoding=dict(num_feats=WIDTH // 2, normalize=True),
        transformer_decoder=dict(
            num_layers=2,
            return_intermediate=True,
            layer_cfg=dict(
                self_attn_cfg=dict(**_ATTENTION, batch_first=True),
                cross_attn_cfg=dict(**_ATTENTION, batch_first=True),
                ffn_cfg=_FFN,
            ),
            init_cfg=None,
        ),
        loss_cls=dict(type='CrossEntropyLoss', loss_weight=2.0, reduction='mean', class_weight=[1.0] * 3 + [0.1]),
        loss_mask=dict(type='CrossEntropyLoss', use_sigmoid=True, reduction='mean', loss_weight=5.0),
        loss_dice=dict(type='DiceLoss', use_sigmoid=True, activate=True, reduction='mean', naive_dice=True, eps=1.0),
    ),
    panoptic_fusion_head=dict(type='MaskFormerFusionHead', num_things_classes=3, num_stuff_classes=0),
    train_cfg=dict(
        num_points=64,
        oversample_ratio=3.0,
        importance_sample_ratio=0.75,
        assigner=dict(type='HungarianAssigner', match_costs=_MASK_COSTS),
        sampler=dict(type='MaskPseudoSampler'),
    ),
    test_cfg=dict(panoptic_on=False, semantic_on=False, instance_on=True, max_per_image=5),
)

_MASKS = MASK2FORMER['panoptic_head']
_BATCH_FIRST = dict(**_ATTENTION, batch_first=True)
MASKFORMER = {
    **MASK2FORMER,
    'type': 'MaskFormer',
    'panoptic_head': dict(
        **{
            key: _MASKS[key]
            for key in ('in_channels', 'feat_channels', 'out_channels', 'num_things_classes', 'num_stuff_classes')
        },
        type='MaskFormerHead',
        num_queries=5,
        pixel_decoder=dict(
            type='TransformerEncoderPixelDecoder',
            norm_cfg=dict(type='GN', num_groups=8),
            act_cfg=dict(type='ReLU'),
            encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=_BATCH_FIRST, ffn_cfg=_FFN)),
            positional_encoding=dict(num_feats=WIDTH // 2, normalize=True),
        ),
        positional_encoding=dict(num_feats=WIDTH // 2, normalize=True),
        transformer_decoder=dict(
            num_layers=2,
            return_intermediate=True,
            layer_cfg=dict(self_attn_cfg=_BATCH_FIRST, cross_attn_cfg=_BATCH_FIRST, ffn_cfg=_FFN),
        ),
        loss_cls=_MASKS['loss_cls'],
        loss_mask=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, reduction='mean', loss_weight=20.0),
        loss_dice=_MASKS['loss_dice'],
    ),
    'train_cfg': dict(
        assigner=dict(
            type='HungarianAssigner',
            match_costs=[_MASK_COSTS[0], dict(type='FocalLossCost', weight=20.0, binary_input=True), _MASK_COSTS[2]],
        ),
        sampler=dict(type='MaskPseudoSampler'),
    ),
}


def repair_grounding_dino() -> None:
    """Give the decoder of Grounding DINO the layer that its forward pass needs.

    OneDL's MMDetection 3.5.1 widened what DINO's decoder feeds to ``ref_point_head``, and there the layer with it. The
    decoder of Grounding DINO inherits the former alone, so it fails in every call.
    """
    from mmdet.models.layers.transformer.dino_layers import DinoTransformerDecoder
    from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerDecoder
    from mmdet.models.layers.transformer.utils import MLP

    factors = (cls._init_layers.__code__.co_consts for cls in (DinoTransformerDecoder, GroundingDinoTransformerDecoder))
    if [4 in constants for constants in factors] != [True, False]:
        return
    init = GroundingDinoTransformerDecoder._init_layers

    def _init_layers(self: Any) -> None:
        init(self)
        self.ref_point_head = MLP(self.embed_dims * 4, self.embed_dims, self.embed_dims, 2)

    GroundingDinoTransformerDecoder._init_layers = _init_layers


def grounding_dino(bert: str) -> dict[str, Any]:
    """Grounding DINO with a text encoder from a folder."""
    repair_grounding_dino()
    level_layers = copy.deepcopy(_LEVEL_LAYERS)
    level_layers['decoder']['layer_cfg']['cross_attn_text_cfg'] = _ATTENTION
    level_layers['encoder'].update(
        num_cp=0,
        text_layer_cfg=dict(self_attn_cfg=_ATTENTION, ffn_cfg=_FFN),
        fusion_layer_cfg=dict(
            v_dim=256, l_dim=256, embed_dim=WIDTH, num_heads=2, dropout=0.0, drop_path=0.0, init_values=1.0
        ),
    )
    head = dict(
        type='GroundingDINOHead',
        num_classes=16,
        embed_dims=WIDTH,
        sync_cls_avg_factor=True,
        contrastive_cfg=dict(max_text_len=16, log_scale='auto', bias=True),
        **_LOSSES,
    )
    costs = [dict(type='BinaryFocalLossCost', weight=2.0), *_COSTS[1:]]
    config = {
        **DINO,
        **level_layers,
        'type': 'GroundingDINO',
        'language_model': dict(
            type='BertModel',
            name=bert,
            max_tokens=16,
            pad_to_max=False,
            use_sub_sentence_represent=True,
            special_tokens_list=['[CLS]', '[SEP]', '.', '?'],
            add_pooling_layer=False,
        ),
        'bbox_head': head,
        'train_cfg': dict(assigner=dict(type='HungarianAssigner', match_costs=costs)),
    }
    return _wide(config)


@contextlib.contextmanager
def narrow_fusion() -> Iterator[None]:
    """Build fusion layers of GLIP for a narrow text encoder: no config reaches their widths, 768 and 2048."""
    from mmdet.models.utils import VLFuse

    init: Any = VLFuse.__init__
    whole = init.__defaults__
    init.__defaults__ = (256, WIDTH, WIDTH, 2, 0.1, 0.0, False)
    try:
        yield
    finally:
        init.__defaults__ = whole


def glip(bert: str) -> dict[str, Any]:
    """GLIP with fusion layers and a text encoder from a folder. It is built within :func:`narrow_fusion`."""
    return dict(
        type='GLIP',
        data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
        backbone=SWIN,
        neck=dict(
            type='FPN',
            in_channels=[16, 32, 64],
            out_channels=256,
            start_level=0,
            relu_before_extra_convs=True,
            add_extra_convs='on_output',
            num_outs=5,
        ),
        bbox_head=dict(
            type='ATSSVLFusionHead',
            lang_model_name=bert,
            num_classes=16,
            in_channels=256,
            feat_channels=256,
            early_fuse=True,
            num_dyhead_blocks=1,
            anchor_generator=dict(
                type='AnchorGenerator',
                ratios=[1.0],
                octave_base_scale=8,
                scales_per_octave=1,
                strides=[8, 16, 32, 64, 128],
                center_offset=0.5,
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoderForGLIP', target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
            loss_centerness=dict(type='CrossEntropyLoss', use_sigmoid=True, loss_weight=1.0),
        ),
        language_model=dict(type='BertModel', name=bert),
        train_cfg=dict(assigner=dict(type='ATSSAssigner', topk=9), allowed_border=-1, pos_weight=-1, debug=False),
        test_cfg=dict(
            nms_pre=20, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.6), max_per_img=5
        ),
    )


def build(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Build a detector with random weights, in evaluation mode."""
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    torch.manual_seed(seed)
    with narrow_fusion() if config['type'] == 'GLIP' else contextlib.nullcontext():
        model = MODELS.build(ConfigDict(copy.deepcopy(config)))
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')  # it would list every tensor
    model.init_weights()
    logger.setLevel(level)
    return model.eval()


def batch(
    masks: bool = False, text: str | tuple[str, ...] | None = None, size: tuple[int, int] = (64, 96)
) -> dict[str, Any]:
    """Two images of noise with two boxes each, as the data loader gives them."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    random = torch.Generator().manual_seed(7)
    images, samples = [], []
    for number in range(2):
        images.append(torch.randint(0, 256, (3, *size), generator=random, dtype=torch.uint8))
        boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [30.0, 10.0, 80.0, 60.0]]) + number
        instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
        if masks:
            planes = torch.zeros(2, *size, dtype=torch.uint8)
            for plane, (left, top, right, bottom) in zip(planes, boxes.int().tolist()):
                plane[top:bottom, left:right] = 1
            instances.masks = BitmapMasks(planes.numpy(), *size)
        meta = dict(img_shape=size, ori_shape=size, batch_input_shape=size, scale_factor=(1.0, 1.0), img_id=number)
        sample = DetDataSample(metainfo=meta, gt_instances=instances)
        if text is not None:
            sample.set_metainfo(dict(text=text, custom_entities=True))
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)


@torch.no_grad()
def predict(model: nn.Module, data: dict[str, Any]) -> list[Tensor]:
    """Scores, labels and boxes of all predictions."""
    model.eval()
    torch.manual_seed(0)
    predictions = model.test_step(copy.deepcopy(data))
    return [getattr(sample.pred_instances, field) for sample in predictions for field in ('scores', 'labels', 'bboxes')]


def losses(model: nn.Module, data: dict[str, Any]) -> Tensor:
    """The sum of the losses in training mode; the same noise in each call."""
    model.train()
    torch.manual_seed(0)
    prepared = model.data_preprocessor(copy.deepcopy(data), True)
    total, _ = model.parse_losses(model(**prepared, mode='loss'))
    return total
