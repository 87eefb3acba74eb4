"""Adapters parallel to attention and the FFN of a block, or after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from iconformer_mm.adapters import Adapter, TokenGrid
from iconformer_mm.compat import is_compiling

from ..calls import Frame, Passage, run_in_frame
from ..families import FromShape
from ..grids import GridTracker
from ..sites import Site
from .base import BlockAttachment

FFN = 'ffn'
ATTENTION = 'attention'
INPUTS = ('normed', 'residual', 'output', 'sum')
_NAMES = {FFN: 'adapter', ATTENTION: 'adapter_attention'}


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
        at_attention = ATTENTION in adapters
        # An adapter that reads x' has to wait for it, unless nothing reads x' before it changes.
        joins_at_output = family.attention_out is not None and (input != 'sum' or not family.direct)
        self._joins_shared = at_attention and family.shared_out is not None and not family.direct
        self.joins_later = at_attention and not joins_at_output and not self._joins_shared
        # DeiT III uses one norm twice, before attention and before the FFN.
        self._one_norm = family.norm is not None and family.norm == family.attention_norm
        self._has_late_grid = site.reshapes and isinstance(site.grid, FromShape)
        before: dict[str, list[Callable[[Frame, Tensor], Tensor]]] = {}
        after: dict[str, list[Callable[[Frame, Tensor], Tensor]]] = {}
        if self.at_ffn or self.joins_later:  # in post-norm blocks the FFN reads x' directly
            before.setdefault(family.norm or family.ffn, []).append(self._between_branches)
        if self.at_ffn and input == 'normed':
            before.setdefault(family.ffn, []).append(self._see_ffn_input)
        if at_attention and family.skip is not None:
            before.setdefault(family.skip, []).append(self._see_skip)
        if at_attention and input == 'normed':
            if family.attention is not None:
                before.setdefault(family.attention, []).append(self._see_attention_input)
            elif family.attention_norm is not None:
                after.setdefault(family.attention_norm, []).append(self._see_attention_norm)
        if family.shared_out is not None and (input == 'output' or self._joins_shared):
            after.setdefault(family.shared_out, []).append(self._see_shared_output)
        elif input == 'output' and self.at_ffn and family.ffn_out is not None:
            after.setdefault(family.ffn_out, []).append(self._see_ffn_output)
        if at_attention and joins_at_output:
            assert family.attention_out is not None
            after.setdefault(family.attention_out, []).append(self._join_attention)
        self.handlers = {
            self.path(name): Passage(tuple(before.get(name, ())), tuple(after.get(name, ())), input == 'output')
            for name in {**before, **after}
        }

    def _tokens(self, frame: Frame, x: Tensor, place: str | None) -> Tensor:
        """Convert a submodule's input or output to tokens (B, N, d)."""
        first = x.dim() == 4 and place in self.family.channels_first
        if self._has_late_grid and self.needs_grid:
            frame.grid = TokenGrid(*(x.shape[2:4] if first else x.shape[1:3]))
        return x.flatten(2).transpose(1, 2) if first else x.flatten(1, -2)

    def _delta(self, key: str, frame: Frame, tokens: Tensor) -> Tensor:
        """Apply an adapter to tokens (B, N, d)."""
        grid, order = frame.grid, self.family.order
        if order is None or grid is None:
            return self.adapter(frame, key)(tokens, grid)
        size, places = order(self.module, (grid.height, grid.width), tokens.shape[1])
        places = places.to(tokens.device)
        return self.adapter(frame, key)(tokens[:, places.argsort()], TokenGrid(*size))[:, places]

    def _like(self, tokens: Tensor, x: Tensor, place: str | None) -> Tensor:
        """Convert tokens (B, N, d) to the shape of a submodule's input or output."""
        if x.dim() == 4 and place in self.family.channels_first:
            return tokens.transpose(1, 2).reshape(x.shape)
        return tokens.reshape(x.shape)

    def _see_skip(self, frame: Frame, x: Tensor) -> Tensor:
        frame.values['skip'] = self._tokens(frame, x, self.family.skip)
        return x

    def _see_attention_input(self, frame: Frame, normed: Tensor) -> Tensor:
        frame.values.setdefault('attention input', self._tokens(frame, normed, self.family.attention))
        return normed

    def _see_attention_norm(self, frame: Frame, normed: Tensor) -> Tensor:
        frame.values.setdefault('attention input', self._tokens(frame, normed, self.family.attention_norm))
        return normed

    def _see_ffn_input(self, frame: Frame, normed: Tensor) -> Tensor:
        frame.values['ffn input'] = self._tokens(frame, normed, self.family.ffn)
        return normed

    def _see_ffn_output(self, frame: Frame, out: Tensor) -> Tensor:
        frame.values['ffn output'] = self._tokens(frame, out, self.family.ffn_out)
        return out

    def _see_shared_output(self, frame: Frame, out: Tensor) -> Tensor:
        """Store the output of the current branch. Attention runs first, the FFN last."""
        is_first = 'attention output' not in frame.values
        key = 'attention output' if is_first else 'ffn output'
        frame.values[key] = self._tokens(frame, out, self.family.shared_out)
        return self._join_attention(frame, out) if is_first and self._joins_shared else out

    def _skip(self, frame: Frame) -> Tensor:
        """Return the tokens to which the output of attention is added."""
        return frame.values['skip'] if 'skip' in frame.values else frame.values['block input']

    def _parallel_input(self, frame: Frame) -> Tensor:
        """Return the input of an adapter parallel to attention."""
        x = self._skip(frame)
        return frame.values.get('attention input', x) if self.input == 'normed' else x

    def _join_attention(self, frame: Frame, out: Tensor) -> Tensor:
        """Add the adapter's output to the output of attention."""
        place = self.family.attention_out or self.family.shared_out
        if self.input == 'output':
            tokens = self._tokens(frame, out, place)
        elif self.input == 'sum':
            tokens = self._skip(frame) + self._tokens(frame, out, place)
        else:
            tokens = self._parallel_input(frame)
        return out + self._like(self._delta('adapter_attention', frame, tokens), out, place)

    def _between_branches(self, frame: Frame, x: Tensor) -> Tensor:
        """Store x' before the FFN. Add the output of attention's adapter first, unless it was added before."""
        values, place = frame.values, self.family.norm or self.family.ffn
        if self._one_norm and 'attention reads' not in values:
            values['attention reads'] = x
            return x
        if self.joins_later:
            tokens: Any
            if self.input == 'sum':
                tokens = self._tokens(frame, x, place)
            elif self.input == 'output':
                tokens = values.get('attention output')
                if tokens is None:  # the family does not name the output
                    tokens = self._tokens(frame, x, place) - self._skip(frame)
            else:
                tokens = self._parallel_input(frame)
            values['delta'] = self._delta('adapter_attention', frame, tokens)
            x = x + self._like(values['delta'], x, place)
        values['residual'] = self._tokens(frame, x, place)
        return x

    def adapter_grid(self, args: tuple, kwargs: dict) -> TokenGrid | None:
        """Return the grid that the adapters see, or None if they do not need it."""
        if not self.needs_grid:
            return None
        grid = self.grid(args, kwargs)
        if self.family.grid_after is None:
            return grid
        size = self.family.grid_after(self.module, (grid.height, grid.width))
        return TokenGrid(*size, num_prefix_tokens=grid.num_prefix_tokens)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, and add the adapters' outputs."""
        outputs = self.joint.run(self._run_block, self.adapter_grid(args, kwargs), *args, **kwargs)
        out = self.stream_of(outputs)
        if out.requires_grad and not is_compiling():
            # A stage outputs channels-first maps, so their gradient is channels-first in memory. Without this
            # hook, the gradients of all earlier blocks are so, too. Their sums and copies take twice as long.
            out.register_hook(Tensor.contiguous)
        return outputs

    def _run_block(self, grid: Any, *args: Any, **kwargs: Any) -> Any:
        frame = self.begin(args[self.family.stream], grid)
        outputs = run_in_frame(frame, self.joint.host_forward, *args, **kwargs)
        return self.with_stream(outputs, self.end(frame, self.stream_of(outputs)))

    def begin(self, x: Tensor, grid: TokenGrid | None = None, adapters: Mapping[str, Any] | None = None) -> Frame:
        """Begin a call of the block with its residual stream."""
        frame = Frame(self.handlers, grid, adapters=adapters)
        frame.values['block input'] = self._tokens(frame, x, '')
        return frame

    def end(self, frame: Frame, out: Tensor) -> Tensor:
        """Add what the adapters add to the block's output."""
        values = frame.values
        if self.joins_later:
            out = out + self._like(values['delta'], out, '')
        if not self.at_ffn:
            return out
        residual = values['residual']
        if self.input == 'normed':
            tokens = values['ffn input']
        elif self.input == 'residual':
            tokens = residual
        elif self.input == 'sum':
            tokens = self._tokens(frame, out, '')
        else:
            tokens = values.get('ffn output')
            if tokens is None:  # the family does not name the output
                tokens = self._tokens(frame, out, '') - residual
        return out + self._like(self._delta('adapter', frame, tokens), out, '')
