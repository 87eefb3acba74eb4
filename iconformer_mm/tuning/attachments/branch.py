"""Adapters parallel to attention and the FFN of a block, or after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from iconformer_mm.adapters import Adapter
from iconformer_mm.compat import is_compiling

from ..calls import Frame, run_in_frame
from ..grids import GridTracker
from ..sites import Site
from .base import BlockAttachment

FFN = 'ffn'
ATTENTION = 'attention'
INPUTS = ('normed', 'residual', 'output', 'sum')
_NAMES = {FFN: 'adapter', ATTENTION: 'adapter_attention'}


@dataclass
class _Passage:
    """What happens at a submodule during a block's call.

    Attributes:
        before: Called in turn with the frame and the input, each gives the input to take instead.
        after: Called in turn with the frame and the output, each gives the output to return instead.
        splits: Whether a residual stream that the submodule would add (``identity``) is added
            after ``after``, which then sees the branch alone. The sum is the same to the last bit.
    """

    before: tuple[Callable[[Frame, Tensor], Tensor], ...]
    after: tuple[Callable[[Frame, Tensor], Tensor], ...]
    splits: bool = False

    def __call__(self, host_forward: Callable, frame: Frame, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The submodule's forward, listened to."""
        for function in self.before:
            x = function(frame, x)
        identity = kwargs.get('identity') if self.splits else None
        if isinstance(identity, Tensor):
            kwargs['identity'] = identity.new_zeros(())
        out = host_forward(x, *args, **kwargs)
        for function in self.after:
            out = function(frame, out)
        return identity + out if isinstance(identity, Tensor) else out


class BranchAttachment(BlockAttachment):
    """Adds an adapter's output to a branch of a block: attention, FFN, or both.

    With ``x' = x + branch(LN(x))`` an adapter A makes it ``x' + A(input)``. Parallel to the
    branch the input is ``'normed'``, ``LN(x)``, or ``'residual'``, ``x``. After the branch it is
    ``'output'``, ``branch(LN(x))``, or ``'sum'``, ``x'``. In post-norm blocks (SwinV2) the branch
    reads ``x`` itself, and the norm that follows belongs to the branch.

    The FFN's sum is the last thing a block computes. So the output of an adapter at the FFN is
    added to what the block returns. That of attention cannot be, since the FFN sees it, too. It is
    added to the branch's own output, where a submodule of the block returns that. Else it is
    added where the FFN's norm reads x', and once more to what the block returns.

    Args:
        site: The block.
        adapters: Adapters by branch, ``'attention'`` or ``'ffn'``.
        input: What they read.
        tracker: The host's tracker, for families that need one.
    """

    def __init__(self, site: Site, adapters: dict[str, Adapter], input: str, tracker: GridTracker | None) -> None:
        super().__init__(site, {_NAMES[branch]: adapter for branch, adapter in adapters.items()}, tracker)
        self.input = input
        self.needs_grid = any(adapter.needs_grid for adapter in adapters.values())
        self.at_ffn = FFN in adapters
        family = site.family
        # What is made of x' has to wait for it.
        joins_attention = input != 'sum' and family.attention_out is not None
        self.joins_later = ATTENTION in adapters and not joins_attention
        # DeiT III uses one norm twice, first before attention and then before the FFN.
        self._one_norm = family.norm is not None and family.norm == family.attention_norm
        before: dict[str, list[Callable[[Frame, Tensor], Tensor]]] = {}
        after: dict[str, list[Callable[[Frame, Tensor], Tensor]]] = {}
        if self.at_ffn or self.joins_later:  # in post-norm blocks the FFN reads x' itself
            before.setdefault(family.norm or family.ffn, []).append(self._between_branches)
        if self.at_ffn and input == 'normed':
            before.setdefault(family.ffn, []).append(self._see_ffn_input)
        if ATTENTION in adapters and input == 'normed':
            if family.attention is not None:
                before.setdefault(family.attention, []).append(self._see_attention_input)
            elif family.attention_norm is not None:
                after.setdefault(family.attention_norm, []).append(self._see_attention_input)
        if input == 'output' and family.shared_out is not None:
            after.setdefault(family.shared_out, []).append(self._see_shared_output)
        elif input == 'output' and self.at_ffn and family.ffn_out is not None:
            after.setdefault(family.ffn_out, []).append(self._see_ffn_output)
        if ATTENTION in adapters and joins_attention:
            assert family.attention_out is not None
            after.setdefault(family.attention_out, []).append(self._join_attention)
        self.handlers = {
            self.path(name): _Passage(tuple(before.get(name, ())), tuple(after.get(name, ())), input == 'output')
            for name in {**before, **after}
        }

    def _see_attention_input(self, frame: Frame, normed: Tensor) -> Tensor:
        frame.values.setdefault('attention input', normed)
        return normed

    def _see_ffn_input(self, frame: Frame, normed: Tensor) -> Tensor:
        frame.values['ffn input'] = normed
        return normed

    def _see_ffn_output(self, frame: Frame, out: Tensor) -> Tensor:
        frame.values['ffn output'] = out
        return out

    def _see_shared_output(self, frame: Frame, out: Tensor) -> Tensor:
        """Sees the output of the branch that runs, attention first."""
        frame.values['ffn output' if 'attention output' in frame.values else 'attention output'] = out
        return out

    def _parallel_input(self, frame: Frame) -> Tensor:
        """What an adapter parallel to attention reads."""
        x = frame.values['block input']
        return frame.values.get('attention input', x) if self.input == 'normed' else x

    def _join_attention(self, frame: Frame, out: Tensor) -> Tensor:
        """Adds to the output of attention what its adapter says."""
        tokens = out if self.input == 'output' else self._parallel_input(frame)
        return out + self._apply('adapter_attention', frame, tokens, out)

    def _between_branches(self, frame: Frame, x: Tensor) -> Tensor:
        """Sees x' on its way to the FFN; adds to it what the adapter of attention says, unless that was done before."""
        values = frame.values
        if self._one_norm and 'attention reads' not in values:
            values['attention reads'] = x
            return x
        if self.joins_later:
            tokens: Any
            if self.input == 'sum':
                tokens = x
            elif self.input == 'output':
                tokens = values.get('attention output')
                if tokens is None:  # a family that does not name it
                    tokens = x - values['block input'].reshape(x.shape)
            else:
                tokens = self._parallel_input(frame)
            values['delta'] = self._apply('adapter_attention', frame, tokens, x)
            x = x + values['delta']
        values['residual'] = x
        return x

    def _apply(self, key: str, frame: Frame, tokens: Tensor, like: Tensor) -> Tensor:
        """What an adapter makes of tokens (B, N, d) or (B, H, W, d), in the shape of another tensor."""
        return self.part(key)(tokens.flatten(1, -2), frame.grid).reshape(like.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The block's forward, with the adapters' outputs added."""
        grid = self.grid(args, kwargs) if self.needs_grid else None
        out = self.joint.run(self._run_block, grid, *args, **kwargs)
        if out.requires_grad and not is_compiling():
            # A stage hands on its maps with channels first; their gradient comes back so, and without
            # this every block before has its gradients so, whose sums and copies take twice as long.
            out.register_hook(Tensor.contiguous)
        return out

    def _run_block(self, grid: Any, *args: Any, **kwargs: Any) -> Tensor:
        frame = Frame(self.handlers, grid, {'block input': args[0]})
        out = run_in_frame(frame, self.joint.host_forward, *args, **kwargs)
        values = frame.values
        if self.joins_later:
            out = out + values['delta'].reshape(out.shape)
        if self.at_ffn:
            residual = values['residual']
            if self.input == 'normed':
                tokens = values['ffn input']
            elif self.input == 'residual':
                tokens = residual
            elif self.input == 'sum':
                tokens = out
            else:
                tokens = values.get('ffn output')
                if tokens is None:  # a family that does not name it
                    tokens = out - residual.reshape(out.shape)
            out = out + self._apply('adapter', frame, tokens, out)
        return out
