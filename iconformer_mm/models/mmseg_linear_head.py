"""Linear segmentation head of DINOv2's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from mmseg.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class LinearBNHead(BaseDecodeHead):
    """Batch norm and a 1 x 1 convolution on maps of the backbone, as DINOv2 is evaluated (Oquab et al., TMLR 2024).

    The maps are brought to the size of the first and concatenated.

    Args:
        in_channels: Channels of the backbone's map, or of each one.
        in_index: Which of the backbone's maps to take, one or several. Defaults to -1.
        norm_cfg: The norm. Defaults to ``dict(type='SyncBN')``, which is batch norm on one device.
        **kwargs: Further arguments of mmseg's ``BaseDecodeHead``.

    Raises:
        ValueError: ``in_channels`` and ``in_index`` differ in number.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        in_index: int | Sequence[int] = -1,
        norm_cfg: dict | None = None,
        **kwargs: Any,
    ) -> None:
        widths = [in_channels] if isinstance(in_channels, int) else list(in_channels)
        indices = [in_index] if isinstance(in_index, int) else list(in_index)
        if len(widths) != len(indices):
            raise ValueError(
                f'in_channels and in_index name the same maps: got {len(widths)} widths and {len(indices)} indices'
            )
        kwargs.setdefault('dropout_ratio', 0.0)
        super().__init__(
            in_channels=widths,
            in_index=indices,
            channels=sum(widths),
            input_transform='multiple_select',
            norm_cfg=norm_cfg or dict(type='SyncBN', requires_grad=True),
            **kwargs,
        )
        self.norm = build_norm_layer(self.norm_cfg, self.channels)[1]

    def forward(self, inputs: Sequence[Any]) -> Tensor:
        """Classify every place, (B, classes, h, w), from maps (B, C, h, w) or pairs of a map and tokens."""
        maps = [each[0] if isinstance(each, (list, tuple)) else each for each in inputs]
        maps = self._transform_inputs(maps)
        size = maps[0].shape[2:]
        maps = [
            m if m.shape[2:] == size else resize(m, size, mode='bilinear', align_corners=self.align_corners)
            for m in maps
        ]
        return self.cls_seg(self.norm(torch.cat(maps, 1)))
