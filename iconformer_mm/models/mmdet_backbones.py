"""MMDetection's backbones with built-in adapters."""

from __future__ import annotations

from mmdet.models.backbones import SwinTransformer
from mmdet.registry import MODELS

from .peft_backbone import PEFTBackbone
from .timm_features import ICoNTIMMFeatures, TIMMFeatures

MODELS.register_module(module=TIMMFeatures)
MODELS.register_module(module=ICoNTIMMFeatures)


@MODELS.register_module()
class ICoNSwinTransformer(PEFTBackbone, SwinTransformer):
    """Swin Transformer with iCoN adapters.

    It takes all arguments of ``mmdet.SwinTransformer``, and ``peft``.
    """
