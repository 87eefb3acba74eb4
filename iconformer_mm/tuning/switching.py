"""Several adapters on one base: adding, switching, disabling, deleting them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS
from torch import nn

from iconformer_mm.compat import device_of

from .injection import Injection, find_backbone, get_injection, inject, unwrap
from .methods import build_method


def list_adapters(model: nn.Module) -> list[str]:
    """Names of a model's adapters, in the order they were added."""
    injection = get_injection(model)
    return list(injection.adapters) if injection else []


def active_adapter(model: nn.Module) -> str | None:
    """Name of the active adapter, None without one."""
    injection = get_injection(model)
    return injection.active if injection else None


def _require(model: nn.Module, name: str | None = None) -> Injection:
    """The injection, if it has the adapter."""
    if is_model_wrapper(model):
        raise ValueError(
            f'{type(model).__name__} wraps the model and knows only the parameters it had; act on the bare model, '
            'then wrap it'
        )
    injection = get_injection(model)
    if injection is None:
        raise ValueError(f'{type(unwrap(model)).__name__} is not adapted: call inject or add_adapter first')
    if name is not None and name not in injection.adapters:
        raise ValueError(f"there is no adapter '{name}'; there are: {', '.join(injection.adapters)}")
    return injection


def _parts(model: nn.Module) -> dict[str, nn.Module]:
    """What stands beside the backbone and belongs to a task: neck, head and the like."""
    backbone = find_backbone(model)
    if backbone is model:
        return {}
    return {n: m for n, m in model.named_children() if m is not backbone and n != 'data_preprocessor'}


def add_adapter(
    model: nn.Module,
    name: str,
    method: str | dict = 'icon',
    parts: dict[str, nn.Module | dict] | None = None,
    **options: Any,
) -> None:
    """Put another adapter on the same base. It stays inactive unless it is the first.

    The base is not copied; each adapter has a neck and a head of its own.

    Args:
        model: A model, or a backbone alone.
        name: A name that is not taken.
        method: Name or config of the method; adapters may differ in it.
        parts: Neck, head and the like for this adapter, as modules or as
            configs of the model's registry, by their names in the model, e.g.
            ``dict(head=dict(type='LinearClsHead', ...))``. Those not given are
            copies of the model's present ones.
        **options: Options of the method.

    Raises:
        ValueError: The name is taken, the method or a part is unknown, or a
            method that trains the backbone itself is among them. The model is
            unchanged then.
    """
    present = _parts(model)
    for part in parts or {}:
        if part not in present:
            raise ValueError(f"the model has no part '{part}' beside its backbone; it has: {', '.join(present)}")
    own = {n: p if isinstance(p, nn.Module) else MODELS.build(p) for n, p in (parts or {}).items()}
    if get_injection(model) is None:
        inject(model, method, **options)
        injection = _require(model)
        (only,) = injection.adapters.values()
        injection.adapters, injection.active = {name: only}, name
        for part, module in own.items():
            setattr(model, part, module)
        return

    injection = _require(model)
    if name in injection.adapters:
        raise ValueError(f"there is an adapter '{name}' already; delete_adapter(model, '{name}') first")
    built = build_method(method, **options)
    for each in (built, injection.method):
        if not each.freezes:
            raise ValueError(f"method '{each.name}' changes the base itself, so it cannot share it with other adapters")
    injection.add(name, built)
    if injection.current is not None and injection.current.parts is None:
        injection.current.parts = present
    new = {n: own[n] if n in own else copy.deepcopy(m) for n, m in present.items()}
    device = device_of(find_backbone(model))
    injection.adapters[name].parts = {n: m.to(device) for n, m in new.items()}


def set_adapter(model: nn.Module, name: str) -> None:
    """Make an adapter the active one, with its neck and head.

    Nothing is copied. An optimizer made before keeps the parameters it was
    given: to train the adapter, make a new one.

    Args:
        model: An adapted model.
        name: The adapter.

    Raises:
        ValueError: There is no such adapter, or the model is wrapped.
    """
    injection = _require(model, name)
    injection.activate(name)
    for part, module in (injection.adapters[name].parts or {}).items():
        setattr(model, part, module.train(model.training))


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the backbone runs as the base, exactly as before it was adapted.

    Neck and head stay those of the active adapter.

    Args:
        model: An adapted model.

    Example:
        >>> with disabled(model):
        ...     base_features = model.extract_feat(images)
    """
    with _require(model).inactive():
        yield model


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter.

    Without an active adapter the backbone runs as the base, still frozen;
    after the last one it is as it was before the first, free to be trained.

    Args:
        model: An adapted model.
        name: The adapter.

    Raises:
        ValueError: There is no such adapter, or the model is wrapped.
    """
    injection = _require(model, name)
    if injection.active == name:
        injection.activate(None)
    if len(injection.adapters) == 1:
        injection.undo()
    else:
        del injection.adapters[name]
