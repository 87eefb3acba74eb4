"""The connection between one module of a host and the adapters that act there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iconformer_mm.adapters import TokenGrid
from iconformer_mm.compat import device_of, dtype_of, left_to_python

from ..calls import Frame, PerThread, current_frame
from ..grids import GridTracker, grid_of_call
from ..replacement import Replacement
from ..sites import Site

_counting = threading.Lock()


class Override:
    """What a thread runs in the place of the active adapter. This one runs the base."""

    def run(self, joint: Joint, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the module of a joint."""
        return joint.run(joint.host_forward, *args, **kwargs)


_BASE = Override()


class Switch:
    """Selects the active adapter of a model. All joints of a model share one switch.

    Attributes:
        active: Name of the active adapter, or None.
    """

    def __init__(self) -> None:
        self.active: str | None = None
        self._override = PerThread()
        # A count over all threads. Compilers guard on it; they do not guard on a thread-local value.
        self._overrides = 0

    @property
    def override(self) -> Override | None:
        """What this thread runs in the place of the active adapter, None for the active adapter."""
        return self._override.value if self._overrides else None

    @contextmanager
    def overridden(self, override: Override) -> Iterator[None]:
        """Run something else in this thread within the context. The innermost context counts."""
        outer, self._override.value = self._override.value, override
        with _counting:
            self._overrides += 1
        try:
            yield
        finally:
            self._override.value = outer
            with _counting:
                self._overrides -= 1

    def off(self) -> AbstractContextManager[None]:
        """Disable all adapters in this thread within the context. Contexts may be nested."""
        return self.overridden(_BASE)


class Joint(Replacement):
    """Replaces the ``forward`` of one module for all adapters that act there.

    It takes over gradient checkpointing from the module. So a block is recomputed exactly as
    it ran, with the adapter and the token grid of the original call.

    Args:
        module: The module.
        switch: Selects the active adapter.

    Attributes:
        attachments: The module's attachments, by the name of the adapter.
        with_cp: Whether our option asks for gradient checkpointing of the module.
        host_with_cp: Whether the host asks for it.
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
        """Give the module back its ``forward`` and its gradient checkpointing."""
        super().restore()
        if self._took_over:
            self.module.with_cp = True

    def run(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call a function, with gradient checkpointing if it is enabled."""
        if (self.with_cp or self.host_with_cp) and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        return function(*args, **kwargs)

    @left_to_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the active adapter.

        Raises:
            RuntimeError: The module's own gradient checkpointing was switched on after the injection.
        """
        if getattr(self.module, 'with_cp', False):
            raise RuntimeError(
                f'with_cp of a {type(self.module).__name__} was set after the injection. Its own gradient '
                'checkpointing would recompute it without adapters; set it before, or inject with with_cp=True'
            )
        override = self.switch.override
        if override is not None:
            return override.run(self, args, kwargs)
        name = self.switch.active
        attachment = None if name is None else self.attachments.get(name)
        if attachment is None:
            return self.run(self.host_forward, *args, **kwargs)
        args, kwargs = self.input_first(args, kwargs)
        return attachment.forward(*args, **kwargs)


class Tap(Replacement):
    """Replaces the ``forward`` of a submodule of a block.

    It runs the handler that the frame of the block's call has for the submodule. Without a
    handler it runs the submodule.

    Args:
        module: The submodule.
        name: Name of the submodule in the backbone. Frames use it to find the handler.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.name = name
        self.users = 0
        self.replace()

    @left_to_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the submodule, with the handler of the block's call."""
        frame = current_frame()
        handler = None if frame is None else frame.handlers.get(self.name)
        if frame is None or handler is None:
            return self.host_forward(*args, **kwargs)
        frame.called.add(self.name)
        args, kwargs = self.input_first(args, kwargs)
        return handler(self.host_forward, frame, *args, **kwargs)


class Attachment:
    """Puts the modules of one named adapter into a module of the host, and runs it with them.

    The host's module keeps its class, its parameters and their names. An attachment is created
    independently of the host. An :class:`~iconformer_mm.tuning.injection.Injection` installs it.
    Its forward pass does not write to any module. The frame of the call carries all values.

    Args:
        name: Name of the module in the backbone.
        module: The module.
        kind: Kind of the module, for display.
        adapters: Adapter modules, by their names in the host's module. The names contain ``'adapter'``.

    Attributes:
        handlers: Handlers of submodules, see :class:`~iconformer_mm.tuning.calls.Frame`.
        joint: The module's joint, once the attachment is installed.
        suffix: Suffix of the names in the module. It keeps several adapters apart.
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
        """Add the adapters to the module, on its device and in its dtype unless ``dtype`` is given."""
        self.suffix = suffix
        device, dtype = device_of(self.module), dtype or dtype_of(self.module)
        # A module on the meta device waits for its weights. Adapters have theirs.
        place: dict[str, Any] = dict(dtype=dtype) if device.type == 'meta' else dict(device=device, dtype=dtype)
        for key, adapter in self.adapters.items():
            setattr(self.module, key + suffix, adapter.to(**place))

    def unregister(self) -> None:
        """Remove the adapters from the module."""
        for key in self.adapters:
            delattr(self.module, key + self.suffix)

    def part(self, key: str) -> Any:
        """Return an adapter by name. It is read from the module, where FSDP may have wrapped it."""
        return getattr(self.module, key + self.suffix)

    def adapter(self, frame: Frame, key: str) -> Any:
        """Return the adapter that runs in a call."""
        return self.part(key) if frame.adapters is None else frame.adapters[key]

    def path(self, submodule: str) -> str:
        """Return the name of a submodule in the backbone."""
        return f'{self.name}.{submodule}'.strip('.')

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the adapters. The input is the first argument."""
        raise NotImplementedError


class WeightMergingAttachment:
    """Mixin for attachments whose adapters can be merged into weights of the base."""

    def merged_weights(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Return the parameter and the merged value of each weight."""
        raise NotImplementedError


class BlockAttachment(Attachment):
    """An attachment to a Transformer block. It knows the block's token grid.

    Args:
        site: The block.
        adapters: Adapter modules, by their names in the block.
        tracker: The host's tracker, for families that need one. Defaults to None, also for adapters that do not
            need the grid.
    """

    def __init__(self, site: Site, adapters: dict[str, nn.Module], tracker: GridTracker | None = None) -> None:
        super().__init__(site.name, site.block, site.family.name, adapters)
        # Drop the host, so that a block can be pickled without it.
        self.site = replace(site, host=None, patch_embed=None)
        self.family = site.family
        self.tracker = tracker

    def grid(self, args: tuple, kwargs: dict) -> TokenGrid:
        """Return the grid of the tokens in a call of the block."""
        return grid_of_call(self.site, args, kwargs, self.tracker)

    def adapter_grid(self, args: tuple, kwargs: dict) -> TokenGrid | None:
        """Return the grid that the adapters see, or None if they do not need it."""
        return None

    def stream_of(self, outputs: Any) -> Tensor:
        """Return the residual stream among the block's outputs."""
        return outputs[self.family.stream] if isinstance(outputs, tuple) else outputs

    def with_stream(self, outputs: Any, stream: Tensor) -> Any:
        """Return the block's outputs with another residual stream."""
        index = self.family.stream
        return (*outputs[:index], stream, *outputs[index + 1 :]) if isinstance(outputs, tuple) else stream
