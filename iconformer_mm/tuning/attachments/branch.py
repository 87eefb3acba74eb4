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
    """The handler of a submodule during a block's call.

    Attributes:
        before: Functions of the frame and the input, called in order. Each returns the new input.
        after: Functions of the frame and the output, called in order. Each returns the new output.
        splits: Whether to add the residual (``identity``) after the functions in ``after``, instead of in
            the submodule. They then see the branch alone. The sum is bit-identical. Defaults to False.
    """

    before: tuple[Callable[[Frame, Tensor], Tensor], ...]
    after: tuple[Callable[[Frame, Tensor], Tensor], ...]
    splits: bool = False

    def __call__(self, host_forward: Callable, frame: Frame, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the submodule between the functions."""
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

    With ``x' = x + branch(LN(x))``, an adapter A changes ``x'`` to ``x' + A(input)``. Parallel to
    the branch, the input is ``'normed'``, ``LN(x)``, or ``'residual'``, ``x``. After the branch, it
    is ``'output'``, ``branch(LN(x))``, or ``'sum'``, ``x'``. In post-norm blocks (SwinV2) the branch
    reads ``x`` itself, and the norm after it belongs to the branch.

    The FFN's sum is the last operation of a block. So the output of an adapter at the FFN is
    added to the block's output. The output of an adapter at attention must be added earlier, since
    the FFN reads it. If a submodule of the block returns the branch's output, it is added there.
    Otherwise it is added where the FFN's norm reads x', and again to the block's output.

    Args:
        site: The block.
        adapters: Adapters by branch, ``'attention'`` or ``'ffn'``.
        input: What the adapters read: ``'normed'``, ``'residual'``, ``'output'`` or ``'sum'``.
        tracker: The host's tracker, for families that need one.
    """

    def __init__(self, site: Site, adapters: dict[str, Adapter], input: str, tracker: GridTracker | None) -> None:
        super().__init__(site, {_NAMES[branch]: adapter for branch, adapter in adapters.items()}, tracker)
        self.input = input
        self.needs_grid = any(adapter.needs_grid for adapter in adapters.values())
        self.at_ffn = FFN in adapters
        family = site.family
        # An adapter that reads x' has to wait for it.
        joins_attention = input != 'sum' and family.attention_out is not None
        self.joins_later = ATTENTION in adapters and not joins_attention
        # DeiT III uses one norm twice, before attention and before the FFN.
        self._one_norm = family.norm is not None and family.norm == family.attention_norm
        before: dict[str, list[Callable[[Frame, Tensor], Tensor]]] = {}
        after: dict[str, list[Callable[[Frame, Tensor], Tensor]]] = {}
        if self.at_ffn or self.joins_later:  # in post-norm blocks the FFN reads x' directly
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
        """Store the output of the current branch. Attention runs first."""
        frame.values['ffn output' if 'attention output' in frame.values else 'attention output'] = out
        return out

    def _parallel_input(self, frame: Frame) -> Tensor:
        """Return the input of an adapter parallel to attention."""
        x = frame.values['block input']
        return frame.values.get('attention input', x) if self.input == 'normed' else x

    def _join_attention(self, frame: Frame, out: Tensor) -> Tensor:
        """Add the adapter's output to the output of attention."""
        tokens = out if self.input == 'output' else self._parallel_input(frame)
        return out + self._apply('adapter_attention', frame, tokens, out)

    def _between_branches(self, frame: Frame, x: Tensor) -> Tensor:
        """Store x' before the FFN. Add the output of attention's adapter first, unless it was added before."""
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
                if tokens is None:  # the family does not name the output
                    tokens = x - values['block input'].reshape(x.shape)
            else:
                tokens = self._parallel_input(frame)
            values['delta'] = self._apply('adapter_attention', frame, tokens, x)
            x = x + values['delta']
        values['residual'] = x
        return x

    def _apply(self, key: str, frame: Frame, tokens: Tensor, like: Tensor) -> Tensor:
        """Apply an adapter to tokens (B, N, d) or (B, H, W, d). The result has the shape of ``like``."""
        return self.part(key)(tokens.flatten(1, -2), frame.grid).reshape(like.shape)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block, and add the adapters' outputs."""
        grid = self.grid(args, kwargs) if self.needs_grid else None
        out = self.joint.run(self._run_block, grid, *args, **kwargs)
        if out.requires_grad and not is_compiling():
            # A stage outputs channels-first maps, so their gradient is channels-first in memory. Without this
            # hook, the gradients of all earlier blocks are so, too. Their sums and copies take twice as long.
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
                if tokens is None:  # the family does not name the output
                    tokens = out - residual.reshape(out.shape)
            out = out + self._apply('adapter', frame, tokens, out)
        return out
