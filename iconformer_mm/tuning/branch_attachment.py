"""Adapters beside or behind the attention and the FFN of a block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iconformer_mm.adapters import Adapter, TokenGrid

from .attachment import BlockAttachment, GridTracker, Tap, add_delta
from .sites import Site

FFN = 'ffn'
ATTENTION = 'attention'
INPUTS = ('normed', 'residual', 'output', 'sum')
_NAMES = {FFN: 'adapter', ATTENTION: 'adapter_attention'}


class BranchAttachment(BlockAttachment):
    """Adds an adapter's output to a branch of a block: attention, FFN, or both.

    With ``x' = x + branch(LN(x))`` an adapter A makes it ``x' + A(input)``, where
    the input is, parallel to the branch, ``'normed'`` (``LN(x)``) or ``'residual'``
    (``x``), or, behind it, ``'output'`` (``branch(LN(x))``) or ``'sum'`` (``x'``). In
    post-norm blocks (SwinV2) the branch reads ``x`` itself, and the norm that
    follows belongs to the branch.

    Args:
        site: The block.
        adapters: Adapters by branch, ``'attention'`` or ``'ffn'``.
        input: What they read.
        tracker: The host's tracker, for families that need one.

    Raises:
        ValueError: The attention of this family cannot be reached.
    """

    def __init__(self, site: Site, adapters: dict[str, Adapter], input: str, tracker: GridTracker | None) -> None:
        if ATTENTION in adapters and site.family.attention is None:
            raise ValueError(
                f'{site.family.name} blocks ({site.family.block}) run attention within windows that they cut '
                "themselves, so no adapter can stand at their attention; take sites=['ffn']"
            )
        super().__init__(site, {_NAMES[branch]: adapter for branch, adapter in adapters.items()}, tracker)
        self.branches = tuple(adapters)
        self.input = input
        self._grid_now: TokenGrid | None = None
        self._seen: dict[str, Tensor] = {}

    def _make_taps(self) -> list[Tap]:
        family, block, taps = self.family, self.module, []
        if FFN in self.branches and self.input != 'sum':
            # Read by the FFN: LN(x'); by the norm before it, and in post-norm blocks by the FFN: x'.
            reader = family.ffn if self.input == 'normed' or family.norm is None else family.norm
            taps.append(Tap(getattr(block, reader), before=self._see_ffn_input))
        if ATTENTION in self.branches:
            if self.input == 'normed' and family.attention_norm is not None:
                taps.append(Tap(getattr(block, family.attention_norm), after=self._see_attention_input))
            taps.append(Tap(getattr(block, family.attention), after=self._after_attention))
        return taps

    def _see_ffn_input(self, tokens: Tensor) -> None:
        self._seen[FFN] = tokens

    def _see_attention_input(self, tokens: Tensor) -> Tensor:
        # DeiT III uses one norm twice, the first time for attention.
        self._seen.setdefault(ATTENTION, tokens)
        return tokens

    def _after_attention(self, output: Tensor) -> Tensor:
        x = self._seen['block']
        with_identity = self.family.attention_adds_identity
        if self.input == 'normed':
            tokens = self._seen.get(ATTENTION, x)
        elif self.input == 'residual':
            tokens = x
        elif self.input == 'output':
            tokens = output - x if with_identity else output
        else:
            tokens = output if with_identity else output + x
        return add_delta(self.module.adapter_attention, tokens, self._grid_now, output)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The block's forward, with the adapters' outputs added."""
        return self._run(self._forward, self._grid(args, kwargs), *args, **kwargs)

    def _forward(self, grid: TokenGrid, *args: Any, **kwargs: Any) -> Tensor:
        self._grid_now = grid
        self._seen = {'block': args[0]}
        out = self._host_forward(*args, **kwargs)
        seen, self._seen, self._grid_now = self._seen, {}, None
        if FFN not in self.branches:
            return out
        tokens = out if self.input == 'sum' else seen[FFN]
        if self.input == 'output':
            tokens = out - tokens.reshape(out.shape)
        return add_delta(self.module.adapter, tokens, grid, out)
