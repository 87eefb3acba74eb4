"""Necks in MMPretrain's scope."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from mmpretrain.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class TokenPooling(BaseModule):
    """Feature vectors of maps: the class token, where it is given, and the mean of the patches, concatenated.

    DINOv2's linear evaluation (Oquab et al., TMLR 2024) reads its images so, from one block or the last four.

    Example:
        >>> backbone = dict(type='TIMMFeatures', model_name='vit_small_patch14_dinov2', norm=True, prefix_tokens='cls')
        >>> neck, head = dict(type='TokenPooling'), dict(type='LinearClsHead', in_channels=768, num_classes=10)
    """

    def forward(self, inputs: Sequence[Any]) -> tuple[Tensor]:
        """Pool.

        Args:
            inputs: Maps (B, C, h, w), or pairs of a map and a token (B, C) or tokens (B, P, C).

        Returns:
            One vector (B, D): of each map the tokens and then the mean.
        """
        parts = []
        for each in inputs:
            features, *tokens = each if isinstance(each, (list, tuple)) else [each]
            parts += [t.flatten(1) for t in tokens] + [features.mean((2, 3))]
        return (torch.cat(parts, 1),)
