"""Replacing the ``forward`` of one module."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


class Replacement:
    """Replaces ``forward`` of one module on the instance.

    A PyTorch hook is not enough. ``torch.compile`` reuses the compiled code of a module
    for other modules of the same class, even if their hooks differ.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module  # Any, since modules of each library have their own attributes
        self._replaced: Callable | None = None
        self._input_name = next(iter(list(inspect.signature(type(module).forward).parameters)[1:]), None)

    def replace(self) -> None:
        """Put :meth:`forward` in the module's place."""
        self._replaced = self.module.__dict__.get('forward')
        self.module.forward = self.forward

    def restore(self) -> None:
        """Restore the module's ``forward``."""
        if self._replaced is None:
            del self.module.forward
        else:
            self.module.forward = self._replaced

    def host_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward. It is looked up per call: a stored method would pickle as the replacement."""
        if self._replaced is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        return self._replaced(*args, **kwargs)

    def input_first(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return a call's arguments with the input as the first positional one, even if it was given by name."""
        if args or self._input_name not in kwargs:
            return args, kwargs
        rest = {name: value for name, value in kwargs.items() if name != self._input_name}
        return (kwargs[self._input_name],), rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the replacement."""
        raise NotImplementedError


def _view(module: nn.Module) -> nn.Module:
    """Return a copy of a module that shares all it holds, with dictionaries of its own.

    Raises:
        RuntimeError: The ``forward`` of the module was replaced on the instance by a function that runs the module.
    """
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    view.__dict__['_parameters'] = dict(module._parameters)
    view.__dict__['_modules'] = dict(module._modules)
    view.__dict__['_compiled_call_impl'] = None  # it was compiled for the original
    forward = view.__dict__.pop('forward', None)
    while isinstance(getattr(forward, '__self__', None), Replacement):
        # No other replacement acts within the view: of adapters only one is active.
        forward = forward.__self__._replaced
    if forward is not None:
        if getattr(forward, '__self__', None) is not module:
            raise RuntimeError(
                f'the forward of a {type(module).__name__} was replaced on the instance by {forward!r}. It would run '
                'with the original weights, not with those of this PEFT method. Replace forward in the class instead'
            )
        view.__dict__['forward'] = forward.__func__.__get__(view)
    return view


def with_values(module: nn.Module, values: Mapping[str, Tensor | nn.Module]) -> nn.Module:
    """Return a view of a module in which some parameters are replaced by other tensors, or submodules by others.

    The view shares everything else with the module. The module does not change, so any
    number of threads can run views of it with their own values. Attributes that the
    forward pass sets on a module of the view are lost.

    Args:
        module: The module.
        values: Tensors by the names of the parameters that they replace, and modules by
            the paths of those that they replace.

    Raises:
        RuntimeError: The ``forward`` of a module in the view was replaced on the
            instance by a function that runs the original module.
    """
    view = _view(module)
    below: dict[str, dict[str, Tensor | nn.Module]] = {}
    modules: dict[str, nn.Module] = {}
    for name, value in values.items():
        head, _, rest = name.partition('.')
        if rest:
            below.setdefault(head, {})[rest] = value
        elif isinstance(value, nn.Module):
            modules[head] = value
        elif head in view.__dict__:  # FSDP replaces parameters by plain tensors while it runs
            view.__dict__[head] = value
        else:
            view.__dict__['_parameters'][head] = value
    for head, inner in below.items():
        child = module._modules[head]
        assert child is not None
        modules[head] = with_values(child, inner)
    view.__dict__['_modules'].update(modules)
    # Some modules also keep their children in a list, and call them from there.
    views = {id(module._modules[head]): value for head, value in modules.items()}
    for name, kept in module.__dict__.items() if views else ():
        if type(kept) in (list, tuple) and any(id(each) in views for each in kept):
            view.__dict__[name] = type(kept)(views.get(id(each), each) for each in kept)
    return view


def with_forward(module: nn.Module, forward: Callable) -> nn.Module:
    """Return a view of a module that runs a function in the place of its ``forward``."""
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__)
    view.__dict__['_compiled_call_impl'] = None
    view.__dict__['forward'] = forward
    return view


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """Return a parameter by name, or the plain tensor that replaces it while FSDP runs."""
    path, _, last = name.rpartition('.')
    return getattr(module.get_submodule(path), last)
