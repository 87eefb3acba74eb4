"""MMSegmentation's backbones with built-in adapters."""

from __future__ import annotations

from mmseg.models.backbones import SwinTransformer, TIMMBackbone, VisionTransformer
from mmseg.registry import MODELS

from .peft_backbone import PEFTBackbone
from .timm_features import ICoNTIMMFeatures, TIMMFeatures

MODELS.register_module(module=TIMMFeatures)
MODELS.register_module(module=ICoNTIMMFeatures)


@MODELS.register_module()
class ICoNSwinTransformer(PEFTBackbone, SwinTransformer):
    """Swin Transformer with iCoN adapters.

    It takes all arguments of ``mmseg.SwinTransformer``, and ``peft``.
    """


@MODELS.register_module()
class ICoNVisionTransformer(PEFTBackbone, VisionTransformer):
    """Vision Transformer with iCoN adapters.

    It takes all arguments of ``mmseg.VisionTransformer``, and ``peft``.
    """


@MODELS.register_module()
class ICoNTIMMBackbone(PEFTBackbone, TIMMBackbone):
    """A timm ViT, Swin or Swin V2 with iCoN adapters.

    It takes all arguments of ``mmseg.TIMMBackbone``, and ``peft``.
    """
