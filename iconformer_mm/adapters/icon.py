"""The input-conditioned adapter of iConFormer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iconformer_mm.compat import is_plain
from iconformer_mm.ops import dynamic_depthwise_conv2d, dynamic_depthwise_conv_tokens, filter_norm

from .base import (
    BottleneckAdapter,
    Projection,
    TokenGrid,
    check_count,
    check_flag,
    check_kernel_size,
    check_number,
    is_count,
)


class _MapMean(torch.autograd.Function):
    """``maps.mean(dim=(1, 2))`` whose gradient is an expanded view; torch would allocate a full map.

    The mean of an empty map is zero.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        ctx.size = height, width = maps.shape[1:3]
        return maps.mean(dim=(1, 2)) if height * width else maps.sum(dim=(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        height, width = ctx.size
        return (grad / max(height * width, 1))[:, None, None].expand(-1, height, width, -1)


class ICoN(nn.Module):
    """Input-Conditioned Network: generates one K x K kernel per sample and channel.

    According to the paper's abstract (arXiv 2409.02838), the network "generates
    channel-wise convolutional kernels for each feature". The details are ours. The
    generator is linear in the pooled map. FilterNorm (decoupled dynamic filters, Zhou
    et al., CVPR 2021) normalises the kernels over their taps,
    ``(k - mean(k)) / (std(k) + eps) * gamma + beta``, with the population standard
    deviation (see :func:`iconformer_mm.ops.filter_norm`). The other settings are ours
    as well. They measure the benefit of input conditioning.

    Args:
        channels: Channels c of the map.
        kernel_size: Odd kernel size K. Defaults to 3.
        kernel_norm: ``'filter'`` (default), or None for the generator's raw
            output with a bias.
        kernel: ``'dynamic'`` (default), or ``'static'`` for learned kernels that are the
            same for all inputs, with the same normalisation.
        pooling: ``'mean'`` of the map (default), or ``'mean_std'`` for the mean and the
            standard deviation. ``'mean_std'`` computes in float32 if the map is in half
            precision.
        generator_layers: 1 (default) for a linear generator, 2 to add a hidden
            layer of c channels with GELU.
        generator_bias: Whether the generator has a bias under ``kernel_norm='filter'``.
            The bias is a static kernel that the input modulates. Defaults to False.
        eps: Added to the standard deviation. Defaults to 1e-5.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        kernel_norm: str | None = 'filter',
        kernel: str = 'dynamic',
        pooling: str = 'mean',
        generator_layers: int = 1,
        generator_bias: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        check_count('channels', channels)
        check_kernel_size(kernel_size)
        if kernel_norm not in ('filter', None):
            raise ValueError(f"kernel_norm must be 'filter' or None, got {kernel_norm!r}")
        if kernel not in ('dynamic', 'static'):
            raise ValueError(f"kernel must be 'dynamic' or 'static', got {kernel!r}")
        if pooling not in ('mean', 'mean_std'):
            raise ValueError(f"pooling must be 'mean' or 'mean_std', got {pooling!r}")
        if not is_count(generator_layers) or generator_layers > 2:
            raise ValueError(f'generator_layers must be 1 or 2, got {generator_layers!r}')
        check_flag('generator_bias', generator_bias)
        check_number('eps', eps, above=0)
        self.channels = channels
        self.kernel_size = kernel_size
        self.kernel_norm = kernel_norm
        self.kernel = kernel
        self.pooling = pooling
        self.eps = eps
        # The initial kernel is the identity (centre tap 1). Except for raw static kernels, it has a random part, too.
        identity = torch.zeros(channels, kernel_size, kernel_size)
        identity[:, kernel_size // 2, kernel_size // 2] = 1
        if kernel == 'static':
            self.taps = nn.Parameter(identity.clone() if kernel_norm is None else torch.randn_like(identity))
        else:
            context = channels * (2 if pooling == 'mean_std' else 1)
            bias = kernel_norm is None or generator_bias
            self.generator = Projection(channels if generator_layers == 2 else context, identity.numel(), bias=bias)
            self.hidden = Projection(context, channels) if generator_layers == 2 else None
            if kernel_norm is None:
                assert self.generator.bias is not None
                with torch.no_grad():
                    self.generator.bias.copy_(identity.flatten())
        if kernel_norm is not None:
            self.gamma = nn.Parameter(torch.full_like(identity, 1 / kernel_size))
            self.beta = nn.Parameter(identity)

    def pool(self, maps: Tensor, window: int | None) -> Tensor:
        """Pool maps (B, H, W, c), or their windows in row-major order, to (B or B * windows, c or 2 c)."""

        def mean(values: Tensor) -> Tensor:
            if window is not None:
                # Windows that extend past the edge average only the pixels inside the map.
                pooled = F.avg_pool2d(values.permute(0, 3, 1, 2), window, ceil_mode=True, count_include_pad=False)
                return pooled.permute(0, 2, 3, 1).flatten(0, 2)
            # Compilers never materialise the gradient map. The compiler of torch 2.1 also fails on division by sizes.
            return _MapMean.apply(values) if is_plain(values) else values.mean(dim=(1, 2))

        if self.pooling == 'mean':
            return mean(maps)
        # Half precision lacks the range for squares and the digits for their difference. It also rounds 1e-12 to
        # zero, where the gradient of the square root is infinite.
        values = maps if maps.dtype == torch.float64 else maps.float()
        first = mean(values)
        variance = mean(values.square()) - first.square()
        return torch.cat((first, variance.clamp_min(1e-12).sqrt()), dim=1).to(maps.dtype)

    def forward(self, maps: Tensor, window: int | None = None) -> Tensor:
        """Generate the kernels of a batch.

        Args:
            maps: Feature maps, (B, H, W, c).
            window: Side of the square windows that each get their own kernels, in
                tokens. Defaults to None, one set of kernels per map.

        Returns:
            Kernels, (B, c, K, K), or (B * windows, c, K, K).
        """
        if self.kernel == 'static':
            kernels = self.taps.unsqueeze(0)
        else:
            context = self.pool(maps, window)
            if self.hidden is not None:
                context = F.gelu(self.hidden(context))
            kernels = self.generator(context).view(-1, self.channels, self.kernel_size, self.kernel_size)
        if self.kernel_norm is not None:
            kernels = filter_norm(kernels, self.gamma, self.beta, self.eps)
        return kernels.expand(len(maps), -1, -1, -1) if self.kernel == 'static' else kernels

    def extra_repr(self) -> str:
        """Settings, for ``print(model)``."""
        return (
            f'channels={self.channels}, kernel_size={self.kernel_size}, kernel_norm={self.kernel_norm!r}, '
            f'kernel={self.kernel!r}, pooling={self.pooling!r}'
        )


def filter_windows(maps: Tensor, kernels: Tensor, window: int) -> Tensor:
    """Convolve each window of the maps with its own kernels.

    A kernel at the border of a window reads pixels of the neighbouring windows.

    Args:
        maps: Feature maps, (B, H, W, c).
        kernels: Kernels of the windows, (B * windows, c, K, K) with odd K. The order is
            image by image, then row by row.
        window: Side of the windows, in tokens. Windows at the right and bottom edges may
            extend past the map.

    Returns:
        The filtered maps, (B, H, W, c).
    """
    batch, height, width, channels = maps.shape
    halo = kernels.shape[-1] // 2
    rows, columns = -(-height // window), -(-width // window)
    right, bottom = columns * window - width, rows * window - height
    padded = F.pad(maps, (0, 0, halo, halo + right, halo, halo + bottom))
    side = window + 2 * halo
    tiles = padded.unfold(1, side, window).unfold(2, side, window)  # (B, rows, columns, c, side, side)
    tiles = tiles.permute(0, 1, 2, 4, 5, 3).flatten(0, 2)
    out = dynamic_depthwise_conv2d(tiles, kernels)[:, halo : halo + window, halo : halo + window]
    out = out.reshape(batch, rows, columns, window, window, channels).transpose(2, 3)
    return out.reshape(batch, rows * window, columns * window, channels)[:, :height, :width]


class ICoNAdapter(BottleneckAdapter):
    """Adapter that filters its bottleneck with kernels generated from the input.

    ``s * (act(k(z) * z) W_up + b_up)`` with ``z = x W_down + b_down``, where ``k`` are
    the kernels of :class:`ICoN` (iConFormer, Min et al., arXiv 2409.02838).
    Prefix tokens (class, distillation, registers) are not part of the grid. They skip
    the filter and go only through the projections and the activation (ours).

    Args:
        embed_dims: Width d of the host's tokens.
        bottleneck: Width c between the projections. Defaults to 64.
        kernel_size: Odd kernel size K. Defaults to 3.
        kernel_norm: ``'filter'`` or None, see :class:`ICoN`. Defaults to
            ``'filter'``.
        kernel: ``'dynamic'``, or ``'static'`` for learned kernels that are the same for
            all inputs. Defaults to ``'dynamic'``.
        pooling: Statistics that the kernels are generated from, ``'mean'`` or
            ``'mean_std'``. Defaults to ``'mean'``.
        window_size: Side of the windows, in tokens. Each window is pooled on its own and
            filtered with its own kernels. Defaults to None, the whole map.
        generator_layers: Number of layers of the generator, 1 or 2. Defaults to 1.
        generator_bias: Whether a normalised generator has a bias. Defaults to
            False.
        activation: ``'gelu'`` or ``'relu'``. Defaults to ``'gelu'``.
        dropout: Dropout probability after the activation. Defaults to 0.
        scale: Factor s applied to the result. Defaults to 1.
        learnable_scale: Whether s is trained. Defaults to False.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> adapter = ICoNAdapter(96)
        >>> adapter(torch.rand(2, 1 + 7 * 9, 96), TokenGrid(7, 9, num_prefix_tokens=1)).shape
        torch.Size([2, 64, 96])
    """

    patch_only = ('icon',)

    def __init__(
        self,
        embed_dims: int,
        bottleneck: int = 64,
        kernel_size: int = 3,
        kernel_norm: str | None = 'filter',
        kernel: str = 'dynamic',
        pooling: str = 'mean',
        window_size: int | None = None,
        generator_layers: int = 1,
        generator_bias: bool = False,
        activation: str = 'gelu',
        dropout: float = 0.0,
        scale: float = 1.0,
        learnable_scale: bool = False,
    ) -> None:
        super().__init__(embed_dims, bottleneck, activation, dropout, scale, learnable_scale)
        if window_size is not None and not is_count(window_size):
            raise ValueError(f'window_size must be None or an integer of at least 1, got {window_size!r}')
        if window_size is not None and kernel == 'static':
            raise ValueError('a static kernel is the same for all windows: window_size must be None')
        self.window_size = window_size
        self.icon = ICoN(bottleneck, kernel_size, kernel_norm, kernel, pooling, generator_layers, generator_bias)

    def transform(self, z: Tensor, grid: TokenGrid) -> Tensor:
        """Filter the patch tokens of ``z`` (B, N, c). Prefix tokens pass through unchanged."""
        window = self.window_size
        if window is not None:
            return self.on_maps(lambda maps: filter_windows(maps, self.icon(maps, window), window), z, grid)
        kernels = self.icon(z[:, grid.num_prefix_tokens :].unflatten(1, (grid.height, grid.width)))
        return dynamic_depthwise_conv_tokens(z, kernels, grid.height, grid.width)
