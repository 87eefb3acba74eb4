"""The static adapter of AdaptFormer."""

from __future__ import annotations

from .base import BottleneckAdapter


class AdaptFormerAdapter(BottleneckAdapter):
    """Bottleneck MLP parallel to the FFN (AdaptFormer, Chen et al., NeurIPS 2022).

    ``s * (act(x W_down + b_down) W_up + b_up)``. This is iCoN without its kernels, so it
    is the static baseline for iCoN. The defaults are the paper's.

    Args:
        embed_dims: Width d of the host's tokens.
        bottleneck: Width c between the projections. Defaults to 64.
        activation: ``'gelu'`` or ``'relu'``. Defaults to ``'relu'``.
        dropout: Dropout probability after the activation. Defaults to 0.1.
        scale: Factor s applied to the result. Defaults to 0.1.
        learnable_scale: Whether s is trained. Defaults to False.

    Raises:
        ValueError: An argument is out of its range.
    """

    needs_grid = False

    def __init__(
        self,
        embed_dims: int,
        bottleneck: int = 64,
        activation: str = 'relu',
        dropout: float = 0.1,
        scale: float = 0.1,
        learnable_scale: bool = False,
    ) -> None:
        super().__init__(embed_dims, bottleneck, activation, dropout, scale, learnable_scale)
