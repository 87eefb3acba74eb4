"""The contract between an adapter and its host, and the base class of bottleneck adapters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenGrid:
    """Layout of a token sequence in the image.

    Attributes:
        height: Rows of patch tokens.
        width: Columns of patch tokens.
        num_prefix_tokens: Number of class, distillation and register tokens. They come
            before the patch tokens and are not part of the grid. Defaults to 0.
    """

    height: int
    width: int
    num_prefix_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Length of the whole sequence, prefix tokens included."""
        return self.num_prefix_tokens + self.height * self.width

    def check(self, tokens: Tensor) -> None:
        """Raise a ValueError unless ``tokens`` (B, N, d) match the grid."""
        if self.num_prefix_tokens < 0:
            raise ValueError(f'num_prefix_tokens must be at least 0, got {self.num_prefix_tokens}')
        if tokens.shape[1] != self.num_tokens:
            raise ValueError(
                f'{tokens.shape[1]} tokens do not fit the grid of {self.height} x {self.width} patches and '
                f'{self.num_prefix_tokens} prefix tokens ({self.num_tokens} in all): tokens were dropped, '
                'added or merged between the patch embedding and this block'
            )


def is_count(value: object) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_count(name: str, value: object) -> None:
    """Raise a ValueError unless a value is an integer of at least 1."""
    if not is_count(value):
        raise ValueError(f'{name} must be an integer of at least 1, got {value!r}')


def check_kernel_size(value: object) -> None:
    """Raise a ValueError unless a kernel size is odd and at least 1. A kernel needs a centre tap."""
    if not isinstance(value, int) or not is_count(value) or value % 2 == 0:
        raise ValueError(f'kernel_size must be odd and at least 1, got {value!r}')


def check_flag(name: str, value: object) -> None:
    """Raise a ValueError unless a value is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f'{name} must be True or False, got {value!r}')


def check_number(
    name: str, value: object, low: float | None = None, above: float | None = None, below: float | None = None
) -> None:
    """Raise a ValueError unless a value is a finite number within limits.

    Args:
        name: Name of the value in the error message.
        value: The value.
        low: Lower bound, inclusive. Defaults to None, no bound.
        above: Lower bound, exclusive. Defaults to None, no bound.
        below: Upper bound, exclusive. Defaults to None, no bound.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    fits = (low is None or number >= low) and (above is None or number > above) and (below is None or number < below)
    if math.isfinite(number) and fits:
        return
    words = {'at least': low, 'above': above, 'below': below}
    limits = ' and '.join(f'{word} {limit}' for word, limit in words.items() if limit is not None)
    if below is None:
        limits = f'a finite number {"of " if low is not None else ""}{limits}'.strip()
    raise ValueError(f'{name} must be {limits}, got {value!r}')


class Projection(nn.Module):
    """``x @ weight.T + bias``, deliberately not an ``nn.Linear``.

    Hosts initialise every ``nn.Linear`` they contain. timm initialises every module
    that has ``reset_parameters``. Both may happen after the injection. This class is
    neither, so a zero-initialised up-projection survives ``model.init_weights()``.
    The weight starts Kaiming-uniform and the bias at zero.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        bias: Whether to add a bias. Defaults to True.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def zero_(self) -> None:
        """Set weight and bias to zero, so that the projection returns zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Project the last dimension: (..., in_features) to (..., out_features)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        out_features, in_features = self.weight.shape
        return f'{in_features}, {out_features}, bias={self.bias is not None}'


class MapConvolution(nn.Module):
    """Convolution over channels-last maps with stride 1 and zero padding.

    It is not an ``nn.Conv2d``, for the reason given in :class:`Projection`. Weight and
    bias are initialised as in ``nn.Conv2d``.

    Args:
        channels: Input and output channels.
        kernel_size: Odd kernel size.
        groups: ``channels`` for a depth-wise convolution. Defaults to 1.

    Raises:
        ValueError: ``kernel_size`` is not odd and positive.
    """

    def __init__(self, channels: int, kernel_size: int, groups: int = 1) -> None:
        super().__init__()
        check_kernel_size(kernel_size)
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels, channels // groups, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, maps: Tensor) -> Tensor:
        """Convolve, (B, H, W, c) to (B, H, W, c)."""
        padding = self.weight.shape[-1] // 2
        out = F.conv2d(maps.permute(0, 3, 1, 2), self.weight, self.bias, padding=padding, groups=self.groups)
        return out.permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f'{len(self.weight)}, kernel_size={self.weight.shape[-1]}, groups={self.groups}'


class Adapter(nn.Module):
    """Contract: ``forward(tokens, grid)`` returns the scaled delta to add.

    An adapter knows nothing about its host. Both ``tokens`` and the delta are (B, N, d).

    Attributes:
        needs_grid: Whether the adapter uses the layout of the tokens. If True,
            ``N == grid.num_tokens``. If False, the grid is None and the adapter accepts
            any tokens, such as those left after masking in pre-training. Defaults to True.
        patch_only: Names of submodules that process only patch tokens. They are not trained in
            blocks of which only the class tokens are read. Defaults to none.
    """

    needs_grid = True
    patch_only: tuple[str, ...] = ()

    @staticmethod
    def on_maps(function: Callable[[Tensor], Tensor], z: Tensor, grid: TokenGrid) -> Tensor:
        """Apply a function of maps (B, H, W, c) to the patch tokens of ``z`` (B, N, c).

        Prefix tokens pass through unchanged.
        """
        prefix = grid.num_prefix_tokens
        maps = function(z[:, prefix:].unflatten(1, (grid.height, grid.width))).flatten(1, 2)
        return torch.cat((z[:, :prefix], maps), dim=1) if prefix else maps

    def forward(self, tokens: Tensor, grid: Any) -> Tensor:
        """Compute the delta, (B, N, d).

        Args:
            tokens: (B, N, d).
            grid: The :class:`TokenGrid`, or None if the adapter does not need it.
        """
        raise NotImplementedError


_ACTIVATIONS = {'gelu': nn.GELU, 'relu': nn.ReLU}


class BottleneckAdapter(Adapter):
    """Down-projection, :meth:`transform`, activation, zero-initialised up-projection.

    Args:
        embed_dims: Width d of the host's tokens.
        bottleneck: Width c between the projections.
        activation: ``'gelu'`` or ``'relu'``.
        dropout: Probability of zeroing a bottleneck value after the activation.
        scale: Factor s applied to the result.
        learnable_scale: Whether s is a parameter that starts at ``scale``, not a constant.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        embed_dims: int,
        bottleneck: int,
        activation: str,
        dropout: float,
        scale: float,
        learnable_scale: bool,
    ) -> None:
        super().__init__()
        check_count('embed_dims', embed_dims)
        check_count('bottleneck', bottleneck)
        if activation not in _ACTIVATIONS:
            raise ValueError(f'activation must be one of {", ".join(_ACTIVATIONS)}, got {activation!r}')
        check_number('dropout', dropout, low=0, below=1)
        check_number('scale', scale)
        check_flag('learnable_scale', learnable_scale)
        self.embed_dims = embed_dims
        self.bottleneck = bottleneck
        self.down = Projection(embed_dims, bottleneck)
        self.activation = _ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = Projection(bottleneck, embed_dims)
        self.up.zero_()
        self.scale = nn.Parameter(torch.tensor(float(scale))) if learnable_scale else float(scale)
        self._unscaled = not learnable_scale and scale == 1

    def transform(self, z: Tensor, grid: Any) -> Tensor:
        """Transform the bottleneck tokens, (B, N, c) to (B, N, c). The default is the identity."""
        return z

    def forward(self, tokens: Tensor, grid: Any = None) -> Tensor:
        """Compute the scaled delta.

        Args:
            tokens: (B, N, d).
            grid: The :class:`TokenGrid`, or None if the adapter does not need it.

        Returns:
            The delta, (B, N, d). It is zero before any training.

        Raises:
            ValueError: The number of tokens does not match the grid.
        """
        if self.needs_grid:
            grid.check(tokens)
        z = self.transform(self.down(tokens), grid)
        delta = self.up(self.dropout(self.activation(z)))
        return delta if self._unscaled else delta * self.scale
