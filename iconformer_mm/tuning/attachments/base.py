"""The joint between one module of a host and what PEFT methods put there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iconformer_mm.adapters import TokenGrid
from iconformer_mm.compat import device_of, dtype_of

from ..calls import PerThread, current_frame
from ..grids import GridTracker, grid_of_call
from ..replacement import Replacement
from ..sites import Site

_counting = threading.Lock()


class Switch:
    """Says which adapter of a model is active. All joints of a model share one.

    Attributes:
        active: The adapter's name, None without one.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self._off = PerThread()
        # Of all threads. Compilers guard on it, which they do not on a thread's own value.
        self._times_off = 0

    @property
    def current(self) -> str | None:
        """The adapter that runs in this thread: the active one, or None within :meth:`off`."""
        return None if self._times_off and self._off.value else self.active

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it no adapter runs in this thread. It may be nested."""
        self._off.value = (self._off.value or 0) + 1
        with _counting:
            self._times_off += 1
        try:
            yield
        finally:
            self._off.value -= 1
            with _counting:
                self._times_off -= 1


class Joint(Replacement):
    """Stands in for the ``forward`` of one module, for all adapters that act there.

    It takes gradient checkpointing over from the module. A block is then recomputed as it
    ran: with the adapter and the token grid of that very call, whatever came in between.

    Args:
        module: The module.
        switch: Says which adapter is active.

    Attributes:
        attachments: What acts at the module, by the name of the adapter.
        with_cp: Whether the module is recomputed in the backward pass by our option.
        host_with_cp: Whether it is by the host's.
    """

    def __init__(self, module: nn.Module, switch: Switch) -> None:
        super().__init__(module)
        self.switch = switch
        self.attachments: dict[str, Attachment] = {}
        self.with_cp = False
        self._took_over = bool(getattr(module, 'with_cp', False))
        self.host_with_cp = self._took_over
        if self._took_over:
            self.module.with_cp = False
        self.replace()

    def restore(self) -> None:
        """Give the module its ``forward`` and its gradient checkpointing back."""
        super().restore()
        if self._took_over:
            self.module.with_cp = True

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function, by gradient checkpointing where that is asked for."""
        if (self.with_cp or self.host_with_cp) and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        return function(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, with the active adapter.

        Raises:
            RuntimeError: The module's own gradient checkpointing was switched on after the injection.
        """
        if getattr(self.module, 'with_cp', False):
            raise RuntimeError(
                f'with_cp of a {type(self.module).__name__} was set after the injection, and its own gradient '
                'checkpointing would recompute it without adapters; set it before, or inject with with_cp=True'
            )
        name = self.switch.current
        attachment = None if name is None else self.attachments.get(name)
        if attachment is None:
            return self.run(self.host_forward, *args, **kwargs)
        args, kwargs = self.input_first(args, kwargs)
        return attachment.forward(*args, **kwargs)


class Tap(Replacement):
    """Stands in for the ``forward`` of a submodule of a block.

    It does what the frame of the block's call says, and else what the submodule does.

    Args:
        module: The submodule.
        name: Its name in the backbone, by which a frame knows it.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.name = name
        self.users = 0
        self.replace()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The submodule's forward, as the block's call has it."""
        frame = current_frame()
        handler = None if frame is None else frame.handlers.get(self.name)
        if frame is None or handler is None:
            return self.host_forward(*args, **kwargs)
        frame.called.add(self.name)
        args, kwargs = self.input_first(args, kwargs)
        return handler(self.host_forward, frame, *args, **kwargs)


class Attachment:
    """Puts one named adapter's modules into a module of the host, and runs it with them.

    The host's module keeps its class, its parameters and their names. An attachment is made
    apart from the host; an :class:`~iconformer_mm.tuning.injection.Injection` installs it.
    Its forward pass writes nothing: what travels, travels in the frame of the call.

    Args:
        name: Name of the module in the backbone.
        module: The module.
        kind: What kind of module it is, for people.
        adapters: What it is given, by the name it gets in the module; the
            names contain ``'adapter'``.

    Attributes:
        handlers: What happens at submodules, see :class:`~iconformer_mm.tuning.calls.Frame`.
        joint: The module's joint, once it is installed.
        suffix: Follows the names in the module, so that several adapters have a place there.
    """

    def __init__(self, name: str, module: nn.Module, kind: str, adapters: dict[str, nn.Module]) -> None:
        self.name = name
        self.module: Any = module
        self.kind = kind
        self.adapters = adapters
        self.handlers: Mapping[str, Callable] = {}
        self.joint: Any = None
        self.suffix = ''

    def register(self, suffix: str, dtype: torch.dtype | None = None) -> None:
        """Put the adapters into the module, on its device and in its dtype, unless another is given."""
        self.suffix = suffix
        device, dtype = device_of(self.module), dtype or dtype_of(self.module)
        for key, adapter in self.adapters.items():
            setattr(self.module, key + suffix, adapter.to(device=device, dtype=dtype))

    def unregister(self) -> None:
        """Take the adapters out of the module."""
        for key in self.adapters:
            delattr(self.module, key + self.suffix)

    def part(self, key: str) -> Any:
        """An adapter by its name; asked of the module, where FSDP may have wrapped it."""
        return getattr(self.module, key + self.suffix)

    def path(self, submodule: str) -> str:
        """Name of a submodule in the backbone."""
        return f'{self.name}.{submodule}'.strip('.')

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward with the adapters; the input is the first argument."""
        raise NotImplementedError


class WeightMergingAttachment:
    """Mixin of attachments whose adapters can be merged into weights of the base."""

    def merged_weights(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """For each weight its parameter, and the value that it would get."""
        raise NotImplementedError


class BlockAttachment(Attachment):
    """An attachment to a Transformer block, whose token grid it knows.

    Args:
        site: The block.
        adapters: What the block is given, by name.
        tracker: The host's tracker, for families that need one. None, too, where no adapter asks for the grid.
    """

    def __init__(self, site: Site, adapters: dict[str, nn.Module], tracker: GridTracker | None = None) -> None:
        super().__init__(site.name, site.block, site.family.name, adapters)
        self.family = site.family
        self.tracker = tracker

    def grid(self, args: tuple, kwargs: dict) -> TokenGrid:
        """The grid of the tokens that the block is called with."""
        return grid_of_call(self.family, args, kwargs, self.tracker)
