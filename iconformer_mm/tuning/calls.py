"""The state of one call of a host. It is thread-local and never stored on a module."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from iconformer_mm.adapters import TokenGrid


class PerThread(threading.local):
    """Holds a separate value for every thread. Copies and pickles start empty.

    Attributes:
        value: The calling thread's value. Defaults to None.
    """

    value: Any = None

    def __reduce__(self) -> tuple:
        return type(self), ()


@dataclass
class Frame:
    """One call of an adapted block.

    Attributes:
        handlers: Handlers of submodules during the call, by the submodule's name in the
            backbone. A handler takes the submodule's own forward, the frame and the
            submodule's arguments. It returns the submodule's output.
        grid: Grid of the tokens, or None if no adapter of the block needs it.
        values: Values that handlers pass to each other.
        called: Names of the submodules whose handler has run.
        adapters: What runs in the place of the attachment's own adapters, by their names; None for its own.
    """

    handlers: Mapping[str, Callable]
    grid: TokenGrid | None = None
    values: dict[str, Any] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    adapters: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Passage:
    """The handler of a submodule during a block's call.

    Attributes:
        before: Functions of the frame and the input, called in order. Each returns the new input.
        after: Functions of the frame and the output, called in order. Each returns the new output.
        splits: Whether to add the residual (``identity``) after the functions in ``after``, instead of in
            the submodule. They then see the branch alone. The sum is bit-identical. Defaults to False.
    """

    before: tuple[Callable[[Frame, Tensor], Tensor], ...] = ()
    after: tuple[Callable[[Frame, Tensor], Tensor], ...] = ()
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


_frame = PerThread()


def current_frame() -> Frame | None:
    """Return the innermost active call in this thread, or None outside adapted blocks."""
    return _frame.value


def run_in_frame(frame: Frame, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function as part of a block's call.

    Raises:
        RuntimeError: The block did not call a submodule that has a handler, so its adapter had no effect.
    """
    outer, _frame.value = _frame.value, frame
    try:
        out = function(*args, **kwargs)
    finally:  # recomputation in a backward pass stops early with an exception
        _frame.value = outer
    missed = [name for name in frame.handlers if name not in frame.called]
    if missed:
        raise RuntimeError(
            f'the forward pass did not call {", ".join(missed)}, where an adapter acts, so the adapter has no effect '
            'there. Adapt other blocks or layers (blocks, targets), or call the submodule in the forward pass'
        )
    return out
