"""Pyramids of feature maps from the maps of a plain ViT, which are all of one size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import BaseModule
from torch import Tensor, nn

_SCALES = (4, 2, 1, 0.5)


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every place."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(config: dict | None, channels: int) -> nn.Module:
    return LayerNorm2d(channels, eps=1e-6) if config is None else build_norm_layer(config, channels)[1]


def _rescale(scale: float, channels: int, norm: dict | None) -> tuple[nn.Module, int]:
    """ViTDet's change of scale of a map, and the channels that it gives."""
    if scale == 4:
        half, quarter = channels // 2, channels // 4
        up = [nn.ConvTranspose2d(channels, half, 2, 2), _norm(norm, half), nn.GELU()]
        return nn.Sequential(*up, nn.ConvTranspose2d(half, quarter, 2, 2)), quarter
    if scale == 2:
        return nn.ConvTranspose2d(channels, channels // 2, 2, 2), channels // 2
    if scale == 1:
        return nn.Identity(), channels
    return nn.MaxPool2d(2, 2), channels


class ViTPyramid(BaseModule):
    """A pyramid like Swin's from the maps of a plain ViT, for necks and heads whose config is for Swin.

    Deconvolutions and pooling are ViTDet's (Li et al., ECCV 2022); a 1 x 1 convolution and layer norm
    then give each level its channels. Mmseg's ``Feature2Pyramid`` leaves all levels as wide as the ViT.

    Args:
        in_channels: Channels of the ViT's maps.
        out_channels: Channels of each level. Defaults to Swin-T's, ``(96, 192, 384, 768)``.
        scales: Size of each level as a multiple of the map's: 4, 2, 1 or 0.5. Defaults to ``(4, 2, 1, 0.5)``, which
            makes strides of 4 to 32 of one of 16.
        norm_cfg: Config of the norms. Defaults to None, layer norm over channels.
        init_cfg: MMEngine's. Defaults to None, PyTorch's initialisation.

    Raises:
        ValueError: A scale is none of those, or the numbers of levels differ.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Sequence[int] = (96, 192, 384, 768),
        scales: Sequence[float] = _SCALES,
        norm_cfg: dict | None = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg)
        if not scales or not set(scales) <= set(_SCALES):
            raise ValueError(f'scales must be some of {_SCALES}, got {tuple(scales)}')
        if len(scales) != len(out_channels):
            raise ValueError(f'{len(scales)} scales need as many out_channels, got {tuple(out_channels)}')
        if in_channels % 4:
            raise ValueError(f'in_channels must be a multiple of 4, got {in_channels}')
        levels = []
        for scale, width in zip(scales, out_channels):
            change, channels = _rescale(scale, in_channels, norm_cfg)
            levels.append(nn.Sequential(change, *self._project(channels, width, norm_cfg)))
        self.levels = nn.ModuleList(levels)

    @staticmethod
    def _project(channels: int, width: int, norm: dict | None) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 1, bias=False), _norm(norm, width)]

    def forward(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Make the pyramid.

        Args:
            inputs: Maps (B, C, h, w), or pairs of a map and tokens, which are left: one for each level, or one for
                all.

        Returns:
            The levels, the largest first. They are contiguous, as mmcv's RoIAlign needs them.

        Raises:
            ValueError: There is another number of maps.
        """
        maps = [each[0] if isinstance(each, (list, tuple)) else each for each in inputs]
        if len(maps) not in (1, len(self.levels)):
            raise ValueError(
                f'{type(self).__name__} takes one map, or one for each of its {len(self.levels)} levels, got '
                f'{len(maps)}; set out_indices of the backbone'
            )
        maps = maps * (len(self.levels) // len(maps))
        return tuple(level(features).contiguous() for level, features in zip(self.levels, maps))


class SimpleFPN(ViTPyramid):
    """ViTDet's simple feature pyramid (Li et al., ECCV 2022), from the last map of a plain ViT.

    It stands where an FPN would. For the anchors and the RoI extractor the strides are the ViT's times 1/4, 1/2, 1, 2.

    Args:
        in_channels: Channels of the ViT's map.
        out_channels: Channels of all levels. Defaults to 256.
        num_outs: How many levels; those beyond four are the last one, subsampled by 2. Defaults to 5.
        norm_cfg: Config of the norms. Defaults to None, layer norm over channels.
        init_cfg: MMEngine's. Defaults to None, PyTorch's initialisation.

    Raises:
        ValueError: ``num_outs`` is less than 4.

    Example:
        >>> neck = dict(type='SimpleFPN', in_channels=768, out_channels=256, num_outs=5)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        norm_cfg: dict | None = None,
        init_cfg: Any = None,
    ) -> None:
        if num_outs < len(_SCALES):
            raise ValueError(f'num_outs must be at least {len(_SCALES)}, got {num_outs}')
        super().__init__(in_channels, [out_channels] * len(_SCALES), _SCALES, norm_cfg, init_cfg)
        self.num_outs = num_outs

    @staticmethod
    def _project(channels: int, width: int, norm: dict | None) -> list[nn.Module]:
        smooth = nn.Conv2d(width, width, 3, padding=1, bias=False)
        return [*ViTPyramid._project(channels, width, norm), smooth, _norm(norm, width)]

    def forward(self, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        """Make the pyramid of the last of the maps (B, C, h, w)."""
        levels = list(super().forward(inputs[-1:]))
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return tuple(levels)
