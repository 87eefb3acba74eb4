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
        prompts: The tokens to put in; None to take those that the block before
            left in the stream.
        stream: Takes the tokens after the block; None to drop them.
        tracker: The host's tracker.

    Raises:
        ValueError: The block's attention is tied to the place of its tokens.
    """

    def __init__(
        self,
        site: Site,
        prompts: PromptAdapter | None,
        stream: PromptStream | None,
        tracker: GridTracker | None,
    ) -> None:
        if not site.family.takes_prompts:
            raise ValueError(
                f'{site.family.name} blocks ({site.family.block}) take no prompt tokens: their attention is windowed '
                'or depends on positions. Visual prompt tuning needs plain ViT blocks'
            )
        super().__init__(site, {} if prompts is None else {'adapter': prompts}, tracker)
        self.stream = stream

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's forward among prompt tokens."""
        prefix = self._grid((x, *args), kwargs).num_prefix_tokens
        if self.adapters:
            prompts = self.adapters['adapter'](len(x))
        else:
            prompts, self.stream.tokens = self.stream.tokens, None
        out, prompts = self._run(self._forward, prefix, x, prompts, *args, **kwargs)
        if self.stream is not None:
            self.stream.tokens = prompts
        return out

    def _forward(self, prefix: int, x: Tensor, prompts: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = prefix + prompts.shape[1]
        out = self.host_forward(torch.cat((x[:, :prefix], prompts, x[:, prefix:]), dim=1), *args, **kwargs)
        return torch.cat((out[:, :prefix], out[:, end:]), dim=1), out[:, prefix:end]
