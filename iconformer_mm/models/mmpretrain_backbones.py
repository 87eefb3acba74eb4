"""MMPretrain's backbones with built-in adapters."""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones import SwinTransformer, SwinTransformerV2, TIMMBackbone, VisionTransformer
from mmpretrain.registry import MODELS

from .peft_backbone import PEFTBackbone
from .timm_features import ICoNTIMMFeatures, TIMMFeatures

MODELS.register_module(module=TIMMFeatures)
MODELS.register_module(module=ICoNTIMMFeatures)


@MODELS.register_module()
class ICoNVisionTransformer(PEFTBackbone, VisionTransformer):
    """Vision Transformer with iCoN adapters.

    It takes all arguments of ``mmpretrain.VisionTransformer``, and ``peft``.

    Example:
        >>> backbone = dict(type='ICoNVisionTransformer', arch='base', peft=dict(bottleneck=64))
    """


@MODELS.register_module()
class ICoNSwinTransformer(PEFTBackbone, SwinTransformer):
    """Swin Transformer with iCoN adapters.

    It takes all arguments of ``mmpretrain.SwinTransformer``, and ``peft``.

    Example:
        >>> backbone = dict(type='ICoNSwinTransformer', arch='base', peft=dict(bottleneck=64))
    """

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # The parent renames the keys of older checkpoints only if
        # `self.__class__ is SwinTransformer`.
        own_class = self.__class__
        self.__class__ = SwinTransformer
        try:
            self._load_from_state_dict(*args, **kwargs)
        finally:
            self.__class__ = own_class


@MODELS.register_module()
class ICoNSwinTransformerV2(PEFTBackbone, SwinTransformerV2):
    """Swin Transformer V2 with iCoN adapters.

    It takes all arguments of ``mmpretrain.SwinTransformerV2``, and ``peft``.
    """


@MODELS.register_module()
class ICoNTIMMBackbone(PEFTBackbone, TIMMBackbone):
    """A timm ViT, Swin or Swin V2 with iCoN adapters.

    It takes all arguments of ``mmpretrain.TIMMBackbone``, and ``peft``.
    """
