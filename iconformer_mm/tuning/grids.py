"""The token grid of a block's call."""

from __future__ import annotations

from typing import Any

from torch import nn

from iconformer_mm.adapters import TokenGrid

from .calls import PerThread
from .replacement import Replacement
from .sites import Argument, BlockFamily, FromPatchEmbed, FromShape


class GridTracker:
    """Tracks the token grid of a host whose blocks see only a sequence.

    One tracker serves all blocks of a host. Each thread has its own grid. The tracker
    does not refer to the host, so a block can be pickled without the host.

    Args:
        host: Module with a ``patch_embed``.
        source: How to read the grid from the patch embedding.
    """

    def __init__(self, host: nn.Module, source: FromPatchEmbed) -> None:
        prefix = source.num_prefix_tokens
        self.num_prefix_tokens = int(getattr(host, prefix) if isinstance(prefix, str) else prefix)
        self._host = type(host).__name__
        self._grid = PerThread()

    def note(self, height: int, width: int) -> None:
        """Store the grid of the forward pass that starts in this thread."""
        self._grid.value = TokenGrid(height, width, self.num_prefix_tokens)

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

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the patch embedding, and report the grid."""
        args, kwargs = self.input_first(args, kwargs)
        out = self.host_forward(*args, **kwargs)
        self.tracker.note(*self.source.read(self.module, args, out))
        return out


def grid_of_call(family: BlockFamily, args: tuple, kwargs: dict, tracker: GridTracker | None) -> TokenGrid:
    """Return the grid of the tokens in a call of a block.

    Args:
        family: The block's family.
        args: Positional arguments of the call, including the input.
        kwargs: Keyword arguments of the call.
        tracker: The host's tracker, for families that need one.
    """
    source = family.grid
    if isinstance(source, FromPatchEmbed):
        assert tracker is not None
        return tracker.grid()
    if isinstance(source, FromShape):
        return TokenGrid(*args[0].shape[1:3])
    assert isinstance(source, Argument)
    return TokenGrid(*(kwargs[source.name] if source.name in kwargs else args[source.position]))
