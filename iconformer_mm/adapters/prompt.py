"""Prompt tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import check_count, check_number


class PromptAdapter(nn.Module):
    """Learned tokens for a sequence (visual prompt tuning, Jia et al., ECCV 2022).

    As in the paper's code, the tokens start uniform within
    ``+-sqrt(6 / (patch_dims + embed_dims))``.

    Args:
        embed_dims: Width d of the host's tokens.
        patch_dims: Number of values in an image patch, e.g. ``3 * 16 * 16`` for ViT-B/16.
        num_tokens: Number n of tokens.
        dropout: Dropout probability of the tokens. Defaults to 0.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(self, embed_dims: int, patch_dims: int, num_tokens: int, dropout: float = 0.0) -> None:
        super().__init__()
        for name, value in dict(embed_dims=embed_dims, patch_dims=patch_dims, num_tokens=num_tokens).items():
            check_count(name, value)
        check_number('dropout', dropout, low=0, below=1)
        self.tokens = nn.Parameter(torch.empty(num_tokens, embed_dims))
        self.dropout = nn.Dropout(dropout)
        bound = (6 / (patch_dims + embed_dims)) ** 0.5
        nn.init.uniform_(self.tokens, -bound, bound)

    def forward(self, batch_size: int) -> Tensor:
        """Return the tokens for a batch, (B, n, d). As in the paper's code, dropout differs per sample."""
        return self.dropout(self.tokens.expand(batch_size, -1, -1))
