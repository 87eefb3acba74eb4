"""Depth heads for MMSegmentation's DepthEstimator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmseg.models.decode_heads import DPTHead
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn


class DepthLoss:
    """Mixin with the loss of a predicted depth. List it before the class of an mmseg decode head."""

    loss_decode: nn.Module
    align_corners: bool

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Tensor]:
        """Compute the losses of the prediction against the true depth at full size.

        Args:
            seg_logits: Predicted depth in metres, (B, 1, h, w).
            batch_data_samples: Samples with ``gt_depth_map`` (1, H, W) in
                metres. 0 means unknown.

        Returns:
            The losses by name.
        """
        target = torch.stack([sample.gt_depth_map.data for sample in batch_data_samples]).to(seg_logits)
        depth = F.interpolate(seg_logits, size=target.shape[2:], mode='bilinear', align_corners=self.align_corners)
        # For an image without known depth, the gradient of SiLogLoss is NaN.
        known = (target > 0).flatten(1).any(dim=1)
        losses: dict[str, Tensor] = {}
        for loss in [self.loss_decode] if not isinstance(self.loss_decode, nn.ModuleList) else self.loss_decode:
            value = loss(depth[known], target[known]) if known.any() else depth.sum() * 0
            name = str(loss.loss_name)
            losses[name] = losses.get(name, 0) + value
        return losses


@MODELS.register_module()
class DepthDeconvHead(DepthLoss, BaseDecodeHead):
    """Deconvolution head for monocular depth.

    It follows MIM-Depth (Xie et al., CVPR 2023) and GLPDepth (Kim et al., 2022).
    The backbone's last feature map passes through 2x deconvolutions and two
    convolutions. A sigmoid bounds the depth by ``max_depth``. The exact layers
    are ours.

    Args:
        in_channels: Channels of the backbone's map at ``in_index``.
        num_filters: Output channels of each deconvolution. Defaults to
            ``(32, 32, 32)``.
        max_depth: Largest depth, in metres. Defaults to 10.
        norm_cfg: Norm after each deconvolution. Defaults to
            ``dict(type='BN')``.
        loss_decode: Config of the loss. Defaults to
            ``dict(type='SiLogLoss')``.
        in_index: Index of the backbone's map to use. Defaults to -1.
        **kwargs: Further arguments of mmseg's ``BaseDecodeHead``.

    Raises:
        ValueError: ``max_depth`` or ``num_filters`` is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        num_filters: Sequence[int] = (32, 32, 32),
        max_depth: float = 10.0,
        norm_cfg: dict | None = None,
        loss_decode: dict | None = None,
        in_index: int = -1,
        **kwargs: Any,
    ) -> None:
        if max_depth <= 0:
            raise ValueError(f'max_depth must be positive (metres), got {max_depth}')
        if len(num_filters) == 0 or min(num_filters) < 1:
            raise ValueError(f'num_filters must hold one or more positive integers, got {num_filters}')
        super().__init__(
            in_channels=in_channels,
            channels=num_filters[-1],
            num_classes=1,
            out_channels=1,
            threshold=0.5,  # unused, but mmseg requires it for a single channel
            dropout_ratio=0.0,
            norm_cfg=norm_cfg or dict(type='BN'),
            loss_decode=loss_decode or dict(type='SiLogLoss'),
            in_index=in_index,
            init_cfg=dict(type='Normal', layer=['Conv2d', 'ConvTranspose2d'], std=0.001),
            **kwargs,
        )
        self.max_depth = max_depth
        widths = [in_channels, *num_filters]
        self.deconvs = nn.Sequential(
            *(
                nn.Sequential(
                    nn.ConvTranspose2d(narrow, wide, 4, stride=2, padding=1, bias=False),
                    ConvModule(wide, wide, 3, padding=1, norm_cfg=self.norm_cfg),
                )
                for narrow, wide in zip(widths, widths[1:])
            )
        )
        self.conv = ConvModule(self.channels, self.channels, 3, padding=1, norm_cfg=None)
        self.conv_seg = nn.Conv2d(self.channels, 1, 3, padding=1)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Predict depth in metres, (B, 1, H, W), at ``2 ** len(num_filters)`` times the map's size."""
        x = self.conv(self.deconvs(self._transform_inputs(inputs)))
        # In float32, because half precision is too coarse near the ends of a sigmoid.
        return self.conv_seg(x).float().sigmoid() * self.max_depth


@MODELS.register_module()
class DPTDepthHead(DepthLoss, DPTHead):
    """Mmseg's ``DPTHead`` (Ranftl et al., ICCV 2021) for monocular depth.

    A sigmoid bounds the depth by ``max_depth``, as in :class:`DepthDeconvHead`.

    Args:
        embed_dims: Channels of the backbone's maps.
        channels: Channels of the fusion blocks. Defaults to 256.
        max_depth: Largest depth, in metres. Defaults to 10.
        readout_type: How to use the class token: ``'ignore'``, ``'add'`` or ``'project'``. The latter two need pairs
            of a map and the class token, e.g. from ``TIMMFeatures(prefix_tokens='cls')``. Defaults to ``'ignore'``.
        in_index: Indices of the four backbone maps to use. Defaults to ``(0, 1, 2, 3)``.
        loss_decode: Config of the loss. Defaults to ``dict(type='SiLogLoss')``.
        **kwargs: Further arguments of mmseg's ``DPTHead``.

    Raises:
        ValueError: ``max_depth`` is out of range, or the class token is needed but missing.
    """

    def __init__(
        self,
        embed_dims: int = 768,
        channels: int = 256,
        max_depth: float = 10.0,
        readout_type: str = 'ignore',
        in_index: Sequence[int] = (0, 1, 2, 3),
        loss_decode: dict | None = None,
        **kwargs: Any,
    ) -> None:
        if max_depth <= 0:
            raise ValueError(f'max_depth must be positive (metres), got {max_depth}')
        super().__init__(
            embed_dims=embed_dims,
            readout_type=readout_type,
            in_channels=[embed_dims] * len(in_index),
            channels=channels,
            in_index=list(in_index),
            input_transform='multiple_select',
            num_classes=1,
            out_channels=1,
            threshold=0.5,  # unused, but mmseg requires it for a single channel
            dropout_ratio=0.0,
            loss_decode=loss_decode or dict(type='SiLogLoss'),
            **kwargs,
        )
        self.max_depth = max_depth

    def forward(self, inputs: Sequence[Any]) -> Tensor:
        """Predict depth in metres from maps (B, C, h, w), or pairs of a map and the class token (B, C).

        The result is (B, 1, 8h, 8w) if h and w are even, and a few pixels larger if they are odd.
        """
        if isinstance(inputs[0], Tensor):
            if self.reassemble_blocks.readout_type != 'ignore':
                raise ValueError(
                    f"readout_type='{self.reassemble_blocks.readout_type}' needs the class token: set "
                    "prefix_tokens='cls' (TIMMFeatures) or output_cls_token=True (mmseg) in the backbone, or use "
                    "'ignore'"
                )
            inputs = [[features, None] for features in inputs]
        # In float32, because half precision is too coarse near the ends of a sigmoid.
        return super().forward(inputs).float().sigmoid() * self.max_depth
