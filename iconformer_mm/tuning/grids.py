"""The token grid of a block's call."""

from __future__ import annotations

from math import isqrt
from typing import Any

from torch import nn

from iconformer_mm.adapters import TokenGrid
from iconformer_mm.compat import left_to_python

from .calls import PerThread
from .families import Argument, FromBlock, FromPatchEmbed, FromShape, FromSquare
from .replacement import Replacement
from .sites import Site


class GridTracker:
    """Tracks the token grid of a host whose blocks see only a sequence.

    One tracker serves all blocks of a host. Each thread has its own grid. The tracker
    does not refer to the host, so a block can be pickled without the host.

    Args:
        host: Module with a patch embedding.
        source: How to read the grid from the patch embedding.
    """

    def __init__(self, host: nn.Module, source: FromPatchEmbed) -> None:
        prefix = source.num_prefix_tokens
        if callable(prefix):
            prefix = prefix(host)
        self.num_prefix_tokens = int(getattr(host, prefix) if isinstance(prefix, str) else prefix)
        self._host = type(host).__name__
        self._grid = PerThread()

    def note(self, height: int, width: int, num_prefix_tokens: int | None = None) -> None:
        """Store the grid of the forward pass that starts in this thread."""
        prefix = self.num_prefix_tokens if num_prefix_tokens is None else num_prefix_tokens
        self._grid.value = TokenGrid(height, width, prefix)

    def grid(self) -> TokenGrid:
        """Return the grid of the current forward pass in this thread.

        Raises:
            RuntimeError: No patch embedding ran in this thread.
        """
        grid = self._grid.value
        if grid is None:
            raise RuntimeError(
                f'a block of {self._host} ran before its patch embedding did, so the grid of its tokens is unknown; '
                'call the whole backbone'
            )
        return grid


class PatchEmbedTap(Replacement):
    """Reports the grid to a tracker whenever the patch embedding runs.

    Args:
        patch_embed: The host's patch embedding.
        source: How to read the grid from the patch embedding.
        tracker: The tracker.
    """

    def __init__(self, patch_embed: nn.Module, source: FromPatchEmbed, tracker: GridTracker) -> None:
        super().__init__(patch_embed)
        self.source = source
        self.tracker = tracker

    @left_to_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the patch embedding, and report the grid."""
        args, kwargs = self.input_first(args, kwargs)
        if self.source.before:
            self.tracker.note(*self.source.read(self.module, args, None))
            return self.host_forward(*args, **kwargs)
        out = self.host_forward(*args, **kwargs)
        self.tracker.note(*self.source.read(self.module, args, out))
        return out


def grid_of_call(site: Site, args: tuple, kwargs: dict, tracker: GridTracker | None) -> TokenGrid:
    """Return the grid of the tokens in a call of a block.

    Args:
        site: The block.
        args: Positional arguments of the call, including the input.
        kwargs: Keyword arguments of the call.
        tracker: The host's tracker, for blocks that need one.

    Raises:
        ValueError: A block that supports only square maps is called with a number of tokens that is not a square.
    """
    source = site.grid
    if isinstance(source, FromPatchEmbed):
        assert tracker is not None
        return tracker.grid()
    if isinstance(source, FromShape):
        return TokenGrid(*args[0].shape[2:4] if '' in site.family.channels_first else args[0].shape[1:3])
    if isinstance(source, FromBlock):
        return TokenGrid(*source.read(site.block))
    if isinstance(source, FromSquare):
        tokens = args[0].shape[1]
        side = isqrt(tokens)
        if side * side != tokens:
            raise ValueError(
                f'{site.name} ({site.family.name}) was called with {tokens} tokens, which make no square map; use a '
                'method that needs no grid, such as adaptformer, lora or ssf'
            )
        return TokenGrid(side, side)
    assert isinstance(source, Argument)
    prefix = 0 if source.num_prefix_tokens is None else source.num_prefix_tokens(site.block)

    def argument(name: str, position: int) -> Any:
        return kwargs[name] if name in kwargs else args[position]

    size = argument(source.name, source.position)
    if source.width is not None:
        size = size, argument(source.width, source.position + 1)
    height, width = size
    return TokenGrid(height, width, prefix)
