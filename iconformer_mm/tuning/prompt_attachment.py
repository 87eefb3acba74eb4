"""Prompt tokens between the prefix tokens and the patch tokens of a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iconformer_mm.adapters import PromptAdapter

from .attachment import BlockAttachment, GridTracker
from .sites import Site


class PromptStream:
    """Carries the prompt tokens of a forward pass from block to block, past what lies between.

    Attributes:
        tokens: What the last block made of them, (B, n, d).
    """

    tokens: Tensor | None = None


class PromptAttachment(BlockAttachment):
    """Runs a block on a sequence with prompt tokens, and takes them out again.

    The host never sees them, so its outputs keep their form.

    Args:
        site: The block.
        source: Makes the tokens to put in, or holds those of the block before.
        target: Takes the tokens after the block; None to drop them.
        tracker: The host's tracker.
    """

    def __init__(
        self,
        site: Site,
        source: PromptAdapter | PromptStream,
        target: PromptStream | None,
        tracker: GridTracker | None,
    ) -> None:
        super().__init__(site, {'adapter': source} if isinstance(source, PromptAdapter) else {}, tracker)
        self.source = source
        self.target = target

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's forward among prompt tokens."""
        prefix = self._grid((x, *args), kwargs).num_prefix_tokens
        if isinstance(self.source, PromptAdapter):
            prompts = self.source(len(x))
        else:
            prompts, self.source.tokens = self.source.tokens, None
        out, prompts = self._run(self._forward, prefix, x, prompts, *args, **kwargs)
        if self.target is not None:
            self.target.tokens = prompts
        return out

    def _forward(self, prefix: int, x: Tensor, prompts: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = prefix + prompts.shape[1]
        out = self.host_forward(torch.cat((x[:, :prefix], prompts, x[:, prefix:]), dim=1), *args, **kwargs)
        return torch.cat((out[:, :prefix], out[:, end:]), dim=1), out[:, prefix:end]
