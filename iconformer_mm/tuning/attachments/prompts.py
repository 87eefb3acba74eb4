"""Prompt tokens between the prefix tokens and the patch tokens of a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iconformer_mm.adapters import PromptAdapter

from ..calls import PerThread
from ..grids import GridTracker
from ..sites import Site
from .base import BlockAttachment


class PromptStream:
    """Carries the prompt tokens of a forward pass from block to block, past the modules in between.

    Each thread has its own tokens.
    """

    def __init__(self) -> None:
        self._tokens = PerThread()

    def put(self, tokens: Tensor) -> None:
        """Store the tokens (B, n, d) for the next block."""
        self._tokens.value = tokens

    def take(self) -> Tensor:
        """Return and clear the tokens that the previous block stored.

        Raises:
            RuntimeError: No block stored tokens in this thread.
        """
        tokens, self._tokens.value = self._tokens.value, None
        if tokens is None:
            raise RuntimeError(
                'a block ran before the first one did, so it has no prompt tokens; call the whole backbone'
            )
        return tokens


class PromptAttachment(BlockAttachment):
    """Runs a block on a sequence with prompt tokens, and removes them afterwards.

    The host never sees the prompt tokens, so its outputs keep their shape.

    Args:
        site: The block.
        source: Adapter that provides the tokens, or stream that holds the tokens of the previous block.
        target: Stream that receives the tokens after the block, or None to drop them.
        tracker: The host's tracker, for families that need one.
    """

    def __init__(
        self,
        site: Site,
        source: PromptAdapter | PromptStream,
        target: PromptStream | None,
        tracker: GridTracker | None,
    ) -> None:
        super().__init__(site, {'adapter': source} if isinstance(source, PromptAdapter) else {}, tracker)
        self.source = source if isinstance(source, PromptStream) else None
        self.target = target

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block with prompt tokens."""
        prefix = self.grid((x, *args), kwargs).num_prefix_tokens
        prompts = self.part('adapter')(len(x)) if self.source is None else self.source.take()
        out, prompts = self.joint.run(self._run_block, prefix, x, prompts, *args, **kwargs)
        if self.target is not None:
            self.target.put(prompts)
        return out

    def _run_block(self, prefix: int, x: Tensor, prompts: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        end = prefix + prompts.shape[1]
        out = self.joint.host_forward(torch.cat((x[:, :prefix], prompts, x[:, prefix:]), dim=1), *args, **kwargs)
        return torch.cat((out[:, :prefix], out[:, end:]), dim=1), out[:, prefix:end]
