"""Several adapters on one base: adding, switching, disabling, deleting them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS
from torch import nn

from .attachments.base import placement
from .injection import DEFAULT_NAME, PARTS, Injection, escape, find_backbone, get_injection, inject, unwrap
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
    return {n: m for n, m in model.named_children() if m is not backbone and n not in ('data_preprocessor', PARTS)}


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
        _require(model).rename(DEFAULT_NAME, name)
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
    adapter, device = injection.adapters[name], placement(find_backbone(model))[0]
    adapter.release()
    adapter.parts = {n: m.to(device) for n, m in new.items()}
    adapter.hold()
    _register_parts(model, injection)


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
    _register_parts(model, injection)


def _register_parts(model: nn.Module, injection: Injection) -> None:
    """Keep necks and heads of inactive adapters in the model, so that they follow ``.to()`` and ``state_dict()``."""
    if hasattr(model, PARTS):
        delattr(model, PARTS)
    waiting = {
        escape(name): nn.ModuleDict(adapter.parts)
        for name, adapter in injection.adapters.items()
        if adapter.parts and name != injection.active
    }
    if waiting:
        setattr(model, PARTS, nn.ModuleDict(waiting))


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within it the backbone runs as the base, exactly as before it was adapted.

    Neck and head stay those of the active adapter. It holds for the calling thread, touches no module,
    and may be nested. The backward pass of what ran within it may come later.

    Args:
        model: An adapted model.

    Example:
        >>> with disabled(model):
        ...     base_features = model.extract_feat(images)
    """
    with _require(model).switch.off():
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
    injection.delete(name)
    _register_parts(model, injection)
