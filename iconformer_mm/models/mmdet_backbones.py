"""MMDetection's backbones with built-in adapters."""

from __future__ import annotations

from mmdet.models.backbones import SwinTransformer
from mmdet.registry import MODELS

from .peft_backbone import PEFTBackbone


@MODELS.register_module()
class ICoNSwinTransformer(PEFTBackbone, SwinTransformer):
    """Swin Transformer with iCoN adapters.

    It takes all arguments of ``mmdet.SwinTransformer``, and ``peft``.
    """
