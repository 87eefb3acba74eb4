"""The original bottleneck adapter."""

from __future__ import annotations

from .base import BottleneckAdapter


class HoulsbyAdapter(BottleneckAdapter):
    """Bottleneck MLP placed after attention and after the FFN (Houlsby et al., ICML 2019).

    ``gelu(x W_down + b_down) W_up + b_up``, added to the adapter's input. The paper
    initialises the up-projection near zero. Here it is exactly zero (ours).

    Args:
        embed_dims: Width d of the host's tokens.
        bottleneck: Width c between the projections. Defaults to 64.
        activation: ``'gelu'`` or ``'relu'``. Defaults to ``'gelu'``.
        dropout: Dropout probability after the activation. Defaults to 0.
        scale: Factor applied to the result. Defaults to 1.
        learnable_scale: Whether the factor is trained. Defaults to False.

    Raises:
        ValueError: An argument is out of its range.
    """

    needs_grid = False

    def __init__(
        self,
        embed_dims: int,
        bottleneck: int = 64,
        activation: str = 'gelu',
        dropout: float = 0.0,
        scale: float = 1.0,
        learnable_scale: bool = False,
    ) -> None:
        super().__init__(embed_dims, bottleneck, activation, dropout, scale, learnable_scale)
