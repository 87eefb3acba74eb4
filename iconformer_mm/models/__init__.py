"""Backbones, necks and heads, registered where each library looks for its own."""

from iconformer_mm.registry import register_with

register_with('mmpretrain', 'MODELS', 'iconformer_mm.models.mmpretrain_backbones')
register_with('mmdet', 'MODELS', 'iconformer_mm.models.mmdet_backbones')
register_with('mmseg', 'MODELS', 'iconformer_mm.models.mmseg_backbones')
register_with('mmseg', 'MODELS', 'iconformer_mm.models.mmseg_depth_head')
register_with('mmseg', 'MODELS', 'iconformer_mm.models.mmseg_linear_head')
register_with('mmpretrain', 'MODELS', 'iconformer_mm.models.mmpretrain_necks')
register_with('mmdet', 'MODELS', 'iconformer_mm.models.mmdet_necks')
register_with('mmseg', 'MODELS', 'iconformer_mm.models.mmseg_necks')
