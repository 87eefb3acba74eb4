"""The input-conditioned adapter of iConFormer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iconformer_mm.ops import dynamic_depthwise_conv2d
from iconformer_mm.registry import ADAPTERS

from .base import BottleneckAdapter, Projection, TokenGrid


class ICoN(nn.Module):
    """Input-Conditioned Network: makes one K x K kernel per sample and channel.

    From the paper's abstract (arXiv 2409.02838): the network "generates
    channel-wise convolutional kernels for each feature". Ours: the generator is
    linear on the pooled map, and the kernels are normalised over their taps by
    the FilterNorm of decoupled dynamic filters (Zhou et al., CVPR 2021),
    ``(k - mean(k)) / (std(k) + eps) * gamma + beta``.

    Args:
        channels: Channels c of the map.
        kernel_size: Odd kernel size K. Defaults to 3.
        kernel_norm: ``'filter'`` (default), or None for the generator's raw
            output with a bias.
        eps: Added to the standard deviation. Defaults to 1e-5.

    Raises:
        ValueError: ``kernel_size`` is not odd and positive, or ``kernel_norm``
            is unknown.
    """

    def __init__(
        self, channels: int, kernel_size: int = 3, kernel_norm: str | None = 'filter', eps: float = 1e-5
    ) -> None:
        super().__init__()
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd and at least 1, got {kernel_size!r}')
        if kernel_norm not in ('filter', None):
            raise ValueError(f"kernel_norm must be 'filter' or None, got {kernel_norm!r}")
        self.channels = channels
        self.kernel_size = kernel_size
        self.kernel_norm = kernel_norm
        self.eps = eps
        self.generator = Projection(channels, channels * kernel_size**2, bias=kernel_norm is None)
        # Either way the first kernels pass the signal (centre tap 1) and stir it.
        identity = torch.zeros(channels, kernel_size, kernel_size)
        identity[:, kernel_size // 2, kernel_size // 2] = 1
        if kernel_norm is None:
            with torch.no_grad():
                self.generator.bias.copy_(identity.flatten())
        else:
            self.gamma = nn.Parameter(torch.full_like(identity, 1 / kernel_size))
            self.beta = nn.Parameter(identity)

    def forward(self, maps: Tensor) -> Tensor:
        """Generate the kernels of a batch.

        Args:
            maps: Feature maps, (B, H, W, c).

        Returns:
            Kernels, (B, c, K, K).
        """
        kernels = self.generator(maps.mean(dim=(1, 2)))
        kernels = kernels.view(-1, self.channels, self.kernel_size, self.kernel_size)
        if self.kernel_norm is None:
            return kernels
        # In float32 also under autocast: a variance of nine small numbers.
        # Clamped, since the square root's gradient at zero is infinite.
        taps = kernels.double() if kernels.dtype == torch.float64 else kernels.float()
        taps = taps - taps.mean(dim=(2, 3), keepdim=True)
        std = taps.square().mean(dim=(2, 3), keepdim=True).clamp_min(1e-20).sqrt()
        return (taps / (std + self.eps) * self.gamma + self.beta).to(kernels.dtype)

    def extra_repr(self) -> str:
        """Settings, for ``print(model)``."""
        return f'channels={self.channels}, kernel_size={self.kernel_size}, kernel_norm={self.kernel_norm!r}'


@ADAPTERS.register_module()
class ICoNAdapter(BottleneckAdapter):
    """Adapter that filters its bottleneck with kernels made from the input itself.

    ``s * (act(k(z) * z) W_up + b_up)`` with ``z = x W_down + b_down`` and ``k``
    the kernels of :class:`ICoN` (iConFormer, Min et al., arXiv 2409.02838).
    Prefix tokens (class, distillation, registers) have no place in the grid:
    they skip the filter and take only the projections and the activation (ours).

    Args:
        embed_dims: Width d of the host's tokens.
        bottleneck: Width c between the projections. Defaults to 64.
        kernel_size: Odd kernel size K. Defaults to 3.
        kernel_norm: ``'filter'`` or None, see :class:`ICoN`. Defaults to
            ``'filter'``.
        activation: ``'gelu'`` or ``'relu'``. Defaults to ``'gelu'``.
        dropout: Dropout probability after the activation. Defaults to 0.
        scale: Factor s of the result. Defaults to 1.
        learnable_scale: Whether s is trained. Defaults to False.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> adapter = ICoNAdapter(96)
        >>> adapter(torch.rand(2, 1 + 7 * 9, 96), TokenGrid(7, 9, num_prefix_tokens=1)).shape
        torch.Size([2, 64, 96])
    """

    def __init__(
        self,
        embed_dims: int,
        bottleneck: int = 64,
        kernel_size: int = 3,
        kernel_norm: str | None = 'filter',
        activation: str = 'gelu',
        dropout: float = 0.0,
        scale: float = 1.0,
        learnable_scale: bool = False,
    ) -> None:
        super().__init__(embed_dims, bottleneck, activation, dropout, scale, learnable_scale)
        self.icon = ICoN(bottleneck, kernel_size, kernel_norm)

    def transform(self, z: Tensor, grid: TokenGrid) -> Tensor:
        """Filter the patch tokens of ``z`` (B, N, c); prefix tokens pass."""
        prefix = grid.num_prefix_tokens
        maps = z[:, prefix:].unflatten(1, (grid.height, grid.width))
        filtered = dynamic_depthwise_conv2d(maps, self.icon(maps)).flatten(1, 2)
        return torch.cat((z[:, :prefix], filtered), dim=1) if prefix else filtered
