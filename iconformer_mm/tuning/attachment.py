"""The joint between one block of a host and one adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iconformer_mm.adapters import Adapter, TokenGrid

from .sites import Argument, FromPatchEmbed, FromShape, Site, Size


class GridTracker:
    """Knows the token grid of a host whose blocks see a bare sequence.

    It listens to the host's patch embedding. One tracker serves all blocks of
    a host.

    Args:
        host: Module with a ``patch_embed``.
        source: How to read the grid there.
    """

    def __init__(self, host: nn.Module, source: FromPatchEmbed) -> None:
        self.host = host
        self.source = source
        self.size: Size | None = None
        self.with_cp = False
        self._handle = host.patch_embed.register_forward_hook(self._watch)

    def _watch(self, patch_embed: nn.Module, inputs: tuple, output: Any) -> None:
        self.size = self.source.read(patch_embed, inputs, output)
        # timm recomputes its blocks from outside of them, where the size of
        # the call is not known any more; the attachments do it instead.
        if getattr(self.host, 'grad_checkpointing', False):
            self.host.grad_checkpointing = False
            self.with_cp = True

    def grid(self) -> TokenGrid:
        """The grid of the forward pass under way."""
        if self.size is None:
            raise RuntimeError(
                f'a block of {type(self.host).__name__} ran before its patch embedding did, so the grid of '
                'its tokens is unknown; call the whole backbone'
            )
        prefix = self.source.num_prefix_tokens
        if isinstance(prefix, str):
            prefix = getattr(self.host, prefix)
        return TokenGrid(*self.size, num_prefix_tokens=int(prefix))

    def detach(self) -> None:
        """Stop listening, hand gradient checkpointing back."""
        self._handle.remove()
        if self.with_cp:
            self.host.grad_checkpointing = True


class Attachment:
    """Adds an adapter's output to what a block returns.

    The adapter becomes ``block.adapter``; the block keeps its class, its
    parameters and their names. ``block.forward`` is replaced on the instance.
    Gradient checkpointing is taken over from the block, so that a block is
    recomputed with the token grid of its own forward pass, whatever sizes came
    in between.

    It is made detached; :meth:`attach` and :meth:`detach` may be called in turn.

    Args:
        site: The block.
        adapter: The adapter.
        reads_residual: Whether the adapter reads the residual stream x' rather
            than LN2(x').
        tracker: The host's tracker, for families that need one.
    """

    def __init__(self, site: Site, adapter: Adapter, reads_residual: bool, tracker: GridTracker | None) -> None:
        self.name = site.name
        self.block = site.block
        self.family = site.family
        self.adapter = adapter
        self.tracker = tracker
        self._source = self.family.norm if reads_residual and self.family.norm else self.family.ffn
        self._tokens: Tensor | None = None

    def attach(self) -> None:
        """Put the adapter into the block, on the block's device and in its dtype."""
        block = self.block
        parameter = next(block.parameters())
        self.adapter.to(device=parameter.device, dtype=parameter.dtype)
        self._handle = getattr(block, self._source).register_forward_pre_hook(self._capture)
        self._replaced = block.__dict__.get('forward')
        self._host_forward = block.forward
        self._with_cp = getattr(block, 'with_cp', False)
        if self._with_cp:
            block.with_cp = False
        block.forward = self.forward
        block.adapter = self.adapter

    def detach(self) -> None:
        """Give the block back as it was."""
        self._handle.remove()
        del self.block.adapter
        if self._replaced is None:
            del self.block.forward
        else:
            self.block.forward = self._replaced
        if self._with_cp:
            self.block.with_cp = True

    def _capture(self, module: nn.Module, inputs: tuple) -> None:
        self._tokens = inputs[0]

    def _grid(self, args: tuple, kwargs: dict) -> TokenGrid:
        source = self.family.grid
        if isinstance(source, FromPatchEmbed):
            return self.tracker.grid()
        if isinstance(source, FromShape):
            return TokenGrid(*args[0].shape[1:3])
        assert isinstance(source, Argument)
        return TokenGrid(*(kwargs[source.name] if source.name in kwargs else args[source.position]))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The block's forward, with the adapter's output added."""
        grid = self._grid(args, kwargs)
        with_cp = self._with_cp or (self.tracker is not None and self.tracker.with_cp)
        if with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, grid, *args, use_reentrant=False, **kwargs)
        return self._forward(grid, *args, **kwargs)

    def _forward(self, grid: TokenGrid, *args: Any, **kwargs: Any) -> Tensor:
        out = self._host_forward(*args, **kwargs)
        tokens, self._tokens = self._tokens, None
        delta = self.block.adapter(tokens.flatten(1, -2), grid)
        return out + delta.reshape(out.shape)
