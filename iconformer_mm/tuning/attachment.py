"""The joint between one module of a host and what a PEFT method puts there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iconformer_mm.adapters import TokenGrid
from iconformer_mm.compat import device_of, dtype_of

from .sites import Argument, BlockFamily, FromPatchEmbed, FromShape, Site, Size


class GridTracker:
    """Knows the token grid of a host whose blocks see a bare sequence.

    It listens to the host's patch embedding. One tracker serves all blocks of
    a host.

    Args:
        host: Module with a ``patch_embed``.
        source: How to read the grid there.
    """

    def __init__(self, host: nn.Module, source: FromPatchEmbed) -> None:
        self.host: Any = host  # of any library, with attributes of its own
        self.source = source
        self.size: Size | None = None
        self.with_cp = False
        self._handle = host.get_submodule('patch_embed').register_forward_hook(self._watch)

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


def grid_of_call(family: BlockFamily, args: tuple, kwargs: dict, tracker: GridTracker | None) -> TokenGrid:
    """The grid of the tokens that a block is called with.

    Args:
        family: The block's family.
        args: Positional arguments of the call.
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


class Replacement:
    """Stands in for ``forward`` of one module, on the instance.

    Not a hook of PyTorch's: code that ``torch.compile`` made for a module is
    taken again for one of the same make with other hooks.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module  # of any library, with attributes of its own
        self._replaced: Callable | None = None

    def replace(self) -> None:
        """Put :meth:`forward` in the module's place."""
        self._replaced = self.module.__dict__.get('forward')
        self.module.forward = self.forward

    def restore(self) -> None:
        """Give the module its ``forward`` back."""
        if self._replaced is None:
            del self.module.forward
        else:
            self.module.forward = self._replaced

    def host_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward; looked up each time, since a stored method would be pickled as what stands in."""
        if self._replaced is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self._replaced(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does now."""
        raise NotImplementedError


class Tap(Replacement):
    """Listens at a module, and may change what goes in or comes out.

    Args:
        module: The module.
        before: Called with its first argument, gives the one to take instead.
        after: Called with its output, gives the one to return instead.
    """

    def __init__(
        self,
        module: nn.Module,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(module)
        self.before = before
        self.after = after

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, listened to."""
        if self.before is not None:
            args = (self.before(args[0]), *args[1:])
        out = self.host_forward(*args, **kwargs)
        return out if self.after is None else self.after(out)


class Attachment(Replacement):
    """Puts adapters into a module, and runs it with them.

    The module keeps its class, its parameters and their names. Gradient
    checkpointing is taken over from it, so that a block is recomputed as it
    ran, adapters and token grid of its own forward pass included, whatever
    came in between.

    It is made detached; :meth:`attach` and :meth:`detach` may be called in
    turn. Subclasses say in :meth:`forward` what happens.

    Args:
        name: Name of the module in the backbone.
        module: The module.
        kind: What kind of module it is, for people.
        adapters: What it is given, by the name it gets in the module; the
            names contain ``'adapter'``.
        tracker: The host's tracker, for families that need one.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        kind: str,
        adapters: dict[str, nn.Module],
        tracker: GridTracker | None = None,
    ) -> None:
        super().__init__(module)
        self.name = name
        self.kind = kind
        self.adapters = adapters
        self.tracker = tracker
        self.with_cp = False
        self._taps: list[Tap] = []

    def attach(self, dtype: torch.dtype | None = None) -> None:
        """Put the adapters into the module, on its device and in its dtype, unless another is given."""
        module = self.module
        device, dtype = device_of(module), dtype or dtype_of(module)
        for name, adapter in self.adapters.items():
            setattr(module, name, adapter.to(device=device, dtype=dtype))
        self._taps = self._make_taps()
        for tap in self._taps:
            tap.replace()
        self._with_cp = getattr(module, 'with_cp', False)
        if self._with_cp:
            module.with_cp = False
        self.replace()

    def detach(self) -> None:
        """Give the module back as it was."""
        self.restore()
        for tap in reversed(self._taps):
            tap.restore()
        for name in self.adapters:
            delattr(self.module, name)
        if self._with_cp:
            self.module.with_cp = True

    def _make_taps(self) -> list[Tap]:
        """Taps within the module, there while attached."""
        return []

    def _run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function, by gradient checkpointing where that is asked for, here or by the host."""
        with_cp = self.with_cp or self._with_cp or (self.tracker is not None and self.tracker.with_cp)
        if with_cp and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        return function(*args, **kwargs)


class BlockAttachment(Attachment):
    """An attachment to a Transformer block, whose token grid it knows.

    Args:
        site: The block.
        adapters: What the block is given, by name.
        tracker: The host's tracker, for families that need one.
    """

    def __init__(self, site: Site, adapters: dict[str, nn.Module], tracker: GridTracker | None) -> None:
        super().__init__(site.name, site.block, site.family.name, adapters, tracker)
        self.family = site.family

    def _grid(self, args: tuple, kwargs: dict) -> TokenGrid:
        return grid_of_call(self.family, args, kwargs, self.tracker)
