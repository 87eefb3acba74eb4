"""Adapters beside or behind the attention and the FFN of a block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from iconformer_mm.adapters import Adapter, TokenGrid
from iconformer_mm.compat import is_compiling

from .attachment import BlockAttachment, GridTracker, Tap
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

    At the FFN, the last branch, A's output is added to what the block returns.
    That of attention cannot be, since the FFN sees it, too. A parallel one is added to the
    branch's own output, where a submodule gives that. Else it is
    added where the FFN's norm reads x' and once more to what the block returns,
    which comes to the same whatever the block does between.

    Args:
        site: The block.
        adapters: Adapters by branch, ``'attention'`` or ``'ffn'``.
        input: What they read.
        tracker: The host's tracker, for families that need one.
    """

    def __init__(self, site: Site, adapters: dict[str, Adapter], input: str, tracker: GridTracker | None) -> None:
        super().__init__(site, {_NAMES[branch]: adapter for branch, adapter in adapters.items()}, tracker)
        self.branches = tuple(adapters)
        self.input = input
        # DeiT III uses one norm twice, first before attention and then before the FFN.
        self._one_norm = site.family.norm is not None and site.family.norm == site.family.attention_norm
        parallel = input in ('normed', 'residual')
        self._joins_attention = ATTENTION in adapters and parallel and site.family.attention_out is not None
        self._grid_now: TokenGrid | None = None
        self._seen: dict[str, Tensor] = {}

    def _make_taps(self) -> list[Tap]:
        family, block = self.family, self.module
        taps = []
        if FFN in self.branches or not self._joins_attention:
            # In post-norm blocks the FFN reads x' itself.
            taps.append(Tap(getattr(block, family.norm or family.ffn), before=self._between_branches))
        if self._joins_attention:
            assert family.attention_out is not None
            taps.append(Tap(getattr(block, family.attention_out), after=self._join_attention))
        if FFN in self.branches and self.input == 'normed' and family.norm is not None:
            taps.append(Tap(getattr(block, family.ffn), before=self._see_ffn_input))
        if ATTENTION in self.branches and self.input == 'normed' and family.attention_norm is not None:
            taps.append(Tap(getattr(block, family.attention_norm), after=self._see_attention_input))
        return taps

    def _see_attention_input(self, normed: Tensor) -> Tensor:
        self._seen.setdefault('attention input', normed)
        return normed

    def _see_ffn_input(self, normed: Tensor) -> Tensor:
        self._seen['ffn input'] = normed
        return normed

    def _parallel_input(self) -> Tensor:
        """What an adapter parallel to attention reads."""
        before = self._seen['block input']
        return self._seen.get('attention input', before) if self.input == 'normed' else before

    def _join_attention(self, out: Tensor) -> Tensor:
        """Adds to the output of attention what its adapter says."""
        return out + self._apply(self.module.adapter_attention, self._parallel_input(), out)

    def _between_branches(self, x: Tensor) -> Tensor:
        """Sees x' on its way to the FFN; adds to it what the adapter of attention says, unless that was done before."""
        if self._one_norm and 'attention reads' not in self._seen:
            self._seen['attention reads'] = x
            return x
        if ATTENTION in self.branches and not self._joins_attention:
            if self.input in ('output', 'sum'):
                tokens = x if self.input == 'sum' else x - self._seen['block input'].reshape(x.shape)
            else:
                tokens = self._parallel_input()
            delta = self._seen['delta'] = self._apply(self.module.adapter_attention, tokens, x)
            x = x + delta
        self._seen['residual'] = x
        return x

    def _apply(self, adapter: Adapter, tokens: Tensor, like: Tensor) -> Tensor:
        """What an adapter makes of tokens (B, N, d) or (B, H, W, d), in the shape of another tensor."""
        return adapter(tokens.flatten(1, -2), self._grid_now).reshape(like.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The block's forward, with the adapters' outputs added."""
        out = self._run(self._forward, self._grid(args, kwargs), *args, **kwargs)
        if out.requires_grad and not is_compiling():
            # A stage hands on its maps with channels first; their gradient comes back so, and without
            # this every block before has its gradients so, whose sums and copies take twice as long.
            out.register_hook(Tensor.contiguous)
        return out

    def _forward(self, grid: TokenGrid, *args: Any, **kwargs: Any) -> Tensor:
        self._grid_now = grid
        self._seen = {'block input': args[0]}
        try:
            out = self.host_forward(*args, **kwargs)
        finally:  # recomputing for a backward pass stops halfway, by an exception
            seen, self._seen = self._seen, {}
        if ATTENTION in self.branches and not self._joins_attention:
            out = out + seen['delta'].reshape(out.shape)
        if FFN in self.branches:
            residual = seen['residual']
            if self.input == 'normed':
                tokens = seen.get('ffn input', residual)
            elif self.input == 'residual':
                tokens = residual
            else:
                tokens = out if self.input == 'sum' else out - residual.reshape(out.shape)
            out = out + self._apply(self.module.adapter, tokens, out)
        self._grid_now = None
        return out
