"""Prototypes of iCoN's generator, to be compared on development tasks (docs/protocol.md). All are ours.

    iconformer data mixture --of digits objects
    PYTHONPATH=benchmarks python tools/compare.py configs/comparison/generator.yaml --out work_dirs/generator

They are methods of their own, so that the package holds no variant that was not found better.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iconformer_mm.adapters.base import BottleneckAdapter, Projection, TokenGrid
from iconformer_mm.ops import dynamic_depthwise_conv_tokens, filter_norm
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning.methods import AdapterMethod

CONTEXTS = ('mean', 'normed', 'class', 'attention')


class Generator(nn.Module):
    """A linear generator of 3 x 3 kernels, from a context that is chosen. See :class:`VariantAdapter`."""

    def __init__(self, channels: int, context: str, rank: int | None) -> None:
        super().__init__()
        self.context = context
        identity = torch.zeros(channels, 3, 3)
        identity[:, 1, 1] = 1
        sizes = [channels, identity.numel()] if rank is None else [channels, rank, identity.numel()]
        self.layers = nn.Sequential(*(Projection(a, b, bias=False) for a, b in itertools.pairwise(sizes)))
        self.query = nn.Parameter(torch.zeros(channels)) if context == 'attention' else None
        self.gamma = nn.Parameter(torch.full_like(identity, 1 / 3))
        self.beta = nn.Parameter(identity)

    def summarise(self, z: Tensor, prefix: int) -> Tensor:
        """Summarise bottleneck tokens (B, N, c), prefix tokens first, as a context (B, c)."""
        if self.context == 'class':
            return z[:, 0]
        patches = z[:, prefix:]
        if self.query is not None:
            weights = (patches @ self.query / len(self.query) ** 0.5).softmax(dim=1)
            return (weights.unsqueeze(-1) * patches).sum(dim=1)
        mean = patches.mean(dim=1)
        return F.layer_norm(mean, mean.shape[-1:]) if self.context == 'normed' else mean

    def forward(self, z: Tensor, prefix: int) -> Tensor:
        """Make the kernels (B, c, 3, 3) of bottleneck tokens (B, N, c)."""
        kernels = self.layers(self.summarise(z, prefix)).view(len(z), *self.gamma.shape)
        return filter_norm(kernels, self.gamma, self.beta, 1e-5)


class VariantAdapter(BottleneckAdapter):
    """iCoN with another context, a low-rank generator, or another path around the filter.

    Args:
        embed_dims: Width d of the host's tokens.
        bottleneck: Width c. Defaults to 64.
        context: What the kernels are generated from. ``'mean'``: the mean patch token, as in
            iCoN. ``'normed'``: the same, normalised over its channels. ``'class'``: the first
            prefix token. ``'attention'``: a mean weighted by a learned query. Defaults to
            ``'mean'``.
        rank: Rank of the generator. Defaults to None, a full matrix.
        residual: Whether the filtered map is added to the map. Defaults to False.
        class_sees: Whether the mean of the filtered map is added to prefix tokens. Defaults
            to False.

    Raises:
        ValueError: The context is unknown.
    """

    def __init__(
        self,
        embed_dims: int,
        bottleneck: int = 64,
        context: str = 'mean',
        rank: int | None = None,
        residual: bool = False,
        class_sees: bool = False,
    ) -> None:
        super().__init__(embed_dims, bottleneck, 'gelu', 0.0, 1.0, False)
        if context not in CONTEXTS:
            raise ValueError(f'context must be one of {", ".join(CONTEXTS)}, got {context!r}')
        self.residual = residual
        self.class_sees = class_sees
        self.patch_only = () if class_sees else ('icon',)
        self.icon = Generator(bottleneck, context, rank)

    def transform(self, z: Tensor, grid: TokenGrid) -> Tensor:
        """Filter the patch tokens of ``z`` (B, N, c)."""
        prefix = grid.num_prefix_tokens
        filtered = dynamic_depthwise_conv_tokens(z, self.icon(z, prefix), grid.height, grid.width)
        if self.class_sees:
            mean = filtered[:, prefix:].mean(dim=1, keepdim=True)
            filtered = torch.cat((filtered[:, :prefix] + mean, filtered[:, prefix:]), dim=1)
        if self.residual:
            filtered = torch.cat((filtered[:, :prefix], filtered[:, prefix:] + z[:, prefix:]), dim=1)
        return filtered


@PEFT_METHODS.register_module(name='icon-variant')
class VariantMethod(AdapterMethod):
    """A :class:`VariantAdapter` parallel to the attention of every block."""

    adapter_class = VariantAdapter
    default_input = 'normed'
    default_sites = ('attention',)
