"""Modules that their host runs without gradients, or past their ``forward``: adapters there would never be trained."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from .backbones import is_below, join
from .families import class_path

_SAN_RECOGNITION = 'mmseg.models.decode_heads.san_head.RecWithAttnbias'


def find_without_gradient(model: nn.Module) -> dict[str, str]:
    """List the modules in which adapters would get no gradient, by path, with the reason.

    A method under ``torch.no_grad()`` counts if ``forward`` reaches it and if it names a module with parameters that no
    other such method names. CLIP's text encoder in SAN is such a case.

    Args:
        model: The model, or a part of it.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        children = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
        methods = list(_methods_of_forward(type(module)))
        for child in children:
            users = {name: without for name, inner, without in methods if child in inner.__code__.co_names}
            if users and all(users.values()):
                found[join(path, child)] = f'{type(module).__name__}.{min(users)} runs it under torch.no_grad()'
        if class_path(type(module)) == _SAN_RECOGNITION and getattr(module, 'cross_attn', False):
            found[join(path, 'layers')] = (
                f'{type(module).__name__} with cross_attn=True reads the weights of its attention itself, so the '
                'attention that is adapted is not the one that runs'
            )
    return found


def check_reached(model: nn.Module, towers: dict[str, nn.Module], method: str) -> None:
    """Refuse towers in which adapters would get no gradient.

    Args:
        model: The model that holds the towers.
        towers: The towers by their paths in the model.
        method: Name of the method.

    Raises:
        ValueError: A part of a tower is run without gradients, or past its ``forward``.
    """
    for path, reason in find_without_gradient(model).items():
        tower = next((t for t in towers if not t or is_below(path, [t]) or is_below(t, [path])), None)
        if tower is not None:
            raise ValueError(
                f"method '{method}' would train nothing in {path!r}: {reason}. Leave {tower!r} out, or name it with "
                "type='frozen'"
            )


class GradientWatch:
    """Sees whether a gradient comes back to each tower that a step of training runs (ours).

    :func:`find_without_gradient` does not find a ``with torch.no_grad():`` around a call, or outputs that are detached.
    So adapted modules are observed while they run. A tower is observed in the first step that runs it, and never
    again. One that a step does not run, such as the head of another task, waits for its own.

    The outputs of modules show it in every setting. Gradients of parameters would not: FSDP and DeepSpeed keep them
    elsewhere, and a step of the optimizer clears them.

    Args:
        towers: Of each tower by path, the adapted modules.
    """

    def __init__(self, towers: Mapping[str, Iterable[nn.Module]]) -> None:
        self._is_training = False
        self._ran: set[str] = set()
        self._reached: set[str] = set()
        self._handles: dict[str, list[RemovableHandle]] = {
            path: [module.register_forward_hook(partial(self._see, path)) for module in modules]
            for path, modules in towers.items()
        }

    def begin(self) -> None:
        """Begin a step."""
        self._is_training = True

    def end(self) -> None:
        """End a step, after its backward pass.

        Raises:
            ValueError: A tower ran, and no gradient came back to it.
        """
        self._is_training = False
        without = [path for path in self._handles if path in self._ran - self._reached]
        self._release(list(self._handles) if without else self._ran)
        if without:
            names = ', '.join(map(repr, without))
            raise ValueError(
                f'no gradient comes back to {names}, so nothing is trained there. The model runs it under '
                "torch.no_grad(), or detaches what it computes. Name it with type='frozen' in `methods`, or leave it "
                'out of `where`; to train it, change the model'
            )

    def release(self) -> None:
        """Stop observing."""
        self._release(list(self._handles))

    def _release(self, paths: Iterable[str]) -> None:
        for path in paths:
            for handle in self._handles.pop(path, ()):
                handle.remove()

    def _see(self, path: str, module: nn.Module, args: tuple, output: Any) -> None:
        tensors = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()]
        if not self._is_training or not tensors:
            return
        self._ran.add(path)
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self._reached.add(path))


def _methods_of_forward(cls: type) -> Iterator[tuple[str, Any, bool]]:
    """Yield the methods of a class that ``forward`` reaches: name, unwrapped, and whether it runs without gradients."""
    todo, seen = ['forward'], set()
    while todo:
        name = todo.pop()
        method = getattr(cls, name, None)
        if name in seen or not inspect.isfunction(method) or hasattr(nn.Module, name) and name != 'forward':
            continue
        seen.add(name)
        inner = inspect.unwrap(method)
        if not hasattr(inner, '__code__'):
            continue
        yield name, inner, inner is not method and _is_under_no_grad(method)
        todo += inner.__code__.co_names


def _is_under_no_grad(method: Any) -> bool:
    """Whether a decorator of a method is ``torch.no_grad()`` or ``torch.inference_mode()``."""
    while inspect.isfunction(method) and hasattr(method, '__wrapped__'):
        held = inspect.getclosurevars(method).nonlocals.values()
        if any(isinstance(getattr(each, '__self__', each), (torch.no_grad, torch.inference_mode)) for each in held):
            return True
        method = method.__wrapped__
    return False
