"""Several adapters on one base: adding, switching, disabling and deleting them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS
from torch import nn

from iconformer_mm.compat import device_of

from .backbones import find_backbones, find_classifiers, is_below, join, unwrap
from .freezing import FrozenParts
from .injection import (
    DEFAULT_NAME,
    PARTS,
    Injection,
    adapt,
    backbones_of,
    beside,
    choose,
    classifiers_of,
    escape,
    get_injection,
    injections_of,
    remove,
)
from .methods import PEFTMethod, Towers, build_method
from .selection import Selection


def list_adapters(model: nn.Module) -> list[str]:
    """List the names of a model's adapters, in the order in which they were added."""
    injection = get_injection(model)
    return list(injection.adapters) if injection else []


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the active adapter, or None."""
    injection = get_injection(model)
    return injection.active if injection else None


def require(model: nn.Module, name: str | None = None) -> Injection:
    """Return the model's injection, or raise a ValueError if it lacks the adapter."""
    if is_model_wrapper(model):
        raise ValueError(
            f'{type(model).__name__} wraps the model and knows only the parameters it had; change the bare model, '
            'then wrap it'
        )
    injection = get_injection(model)
    if injection is None:
        raise ValueError(f'{type(unwrap(model)).__name__} is not adapted: call inject or add_adapter first')
    if name is not None and name not in injection.adapters:
        raise ValueError(f"there is no adapter '{name}'; there are: {', '.join(injection.adapters)}")
    return injection


def _parts(model: nn.Module, selection: Selection) -> dict[str, nn.Module]:
    """Return the parts outside the backbones that belong to a task (neck, head, classifier), by path."""
    injection = get_injection(model)
    if injection is None:
        backbones = find_backbones(model, selection.backbones)
        outside = [join(p, n) for p, b in backbones.items() for n in find_classifiers(b)]
    else:
        backbones = backbones_of(model)
        outside = [join(p, n) for p, b in backbones.items() for n in classifiers_of(injection, b)]
    parts: dict[str, nn.Module] = {}

    def walk(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            where = join(path, name)
            if any(is_below(backbone, [where]) for backbone in backbones if backbone) and where not in backbones:
                walk(child, where)
            elif where not in backbones and '' not in backbones and name not in ('data_preprocessor', PARTS):
                parts[where] = child

    walk(model, '')
    parts.update({path: model.get_submodule(path) for path in outside})
    return parts


def _set_part(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition('.')
    setattr(model.get_submodule(parent), name, module)


def add_adapter(
    model: nn.Module,
    name: str,
    method: str | dict | None = None,
    parts: dict[str, nn.Module | dict] | None = None,
    blocks: str | Sequence[int | str] = 'all',
    freeze: Sequence[str] = (),
    where: str | Sequence[str] | None = None,
    methods: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> None:
    """Add another adapter to the same base. It stays inactive unless it is the first.

    The base is not copied. Each adapter has its own neck and head. All adapters share the modules that the first one
    froze; an adapter need not act in all of them.

    Args:
        model: A model, or a backbone alone.
        name: Name of the new adapter, which must not be taken.
        method: Name or config of the method. It may differ between adapters. Defaults to None, ``icon``.
        parts: Neck, head and other parts for this adapter, by their names in the
            model. Each is a module or a config for the model's registry, e.g.
            ``dict(head=dict(type='LinearClsHead', ...))``. Other parts are copies of
            the model's current ones. Defaults to None, copies of all parts.
        blocks: The blocks to adapt, see :func:`iconformer_mm.inject`. Defaults to ``'all'``.
        freeze: Patterns of parameters outside the backbone that are not trained, see :func:`iconformer_mm.inject`.
            They may differ between adapters. Defaults to none.
        where: The modules to adapt, see :func:`iconformer_mm.inject`. Defaults to None, all that the first adapter
            froze, or the backbone.
        methods: A method for each module, see :func:`iconformer_mm.inject`. Defaults to None, one method.
        **options: Options of the method.

    Raises:
        ValueError: The name is taken, the method or a part is unknown, parameters of the base are trained, or a
            method trains the backbone itself. The model is unchanged in this case.
    """
    built, paths = choose(model, method, None, where, methods, **options)
    if paths is not None and get_injection(model) is not None:
        built = built if isinstance(built, Towers) else Towers(dict.fromkeys(paths, built))
    selection = Selection(blocks, freeze=freeze, backbones=paths)  # type: ignore[arg-type]
    add_selected(model, name, built, parts, selection)


def add_selected(
    model: nn.Module,
    name: str,
    method: str | dict | PEFTMethod,
    parts: dict[str, nn.Module | dict] | None,
    selection: Selection,
    frozen_dtype: str | None = None,
    hold: bool = True,
) -> None:
    """Do what :func:`add_adapter` does, with a complete selection, and a precision for the base of the first adapter.

    See :func:`~.injection.adapt` for ``hold``.

    Raises:
        ValueError: See :func:`add_adapter`.
    """
    injection = get_injection(model)
    if injection is not None:
        require(model)
    present = _parts(model, selection)
    for part in parts or {}:
        if part not in present:
            raise ValueError(f"the model has no part '{part}' outside its backbone; it has: {', '.join(present)}")
    own = {n: p if isinstance(p, nn.Module) else MODELS.build(p) for n, p in (parts or {}).items()}
    built = method if isinstance(method, PEFTMethod) else build_method(method)
    if injection is None:
        before = {part: model.get_submodule(part) for part in own}
        for part, module in own.items():
            _set_part(model, part, module)
        try:
            injection = adapt(model, built, selection, frozen_dtype, hold=hold)
        except Exception:
            for part, module in before.items():
                _set_part(model, part, module)
            raise
        injection.rename(DEFAULT_NAME, name)
        return

    if name in injection.adapters:
        raise ValueError(f"there already is an adapter '{name}'; call delete_adapter(model, '{name}') first")
    for each in (built, injection.method):
        if not each.freezes:
            raise ValueError(f"method '{each.name}' changes the base itself, so it cannot share it with other adapters")
    _check_shareable(model, present)
    new = {n: own[n] if n in own else copy.deepcopy(m) for n, m in present.items()}
    selection = replace(selection, backbones=injection.selection.backbones)
    selection.frozen_names([f'{part}.{n}' for part, m in new.items() for n, _ in m.named_parameters()])
    injection.add(name, built, selection)
    if injection.current is not None and injection.current.parts is None:
        injection.current.parts = present
    adapter, device = injection.adapters[name], device_of(next(iter(injection.backbones.values())))
    adapter.release()
    adapter.parts = {n: m.to(device) for n, m in new.items()}
    adapter.hold()
    _register_parts(model, injection)


def _check_shareable(model: nn.Module, parts: dict[str, nn.Module]) -> None:
    """Reject a second adapter if adapters would share trained parameters."""
    injections = injections_of(model)
    if len(injections) > 1:
        raise ValueError(
            f'{type(model).__name__} has copies that follow its backbone by averaging. They follow one adapter, so '
            'no other can be added'
        )
    backbones = backbones_of(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and '' not in backbones and not is_below(name, [*parts, *backbones]):
            raise ValueError(
                f"'{name}' is a trained parameter of {type(model).__name__} itself, and all adapters would share it; "
                'freeze it, or use a separate copy of the model for each task'
            )


def set_adapter(model: nn.Module, name: str) -> None:
    """Make an adapter the active one, with its neck and head.

    Nothing is copied. An existing optimizer keeps the parameters it was given. Create a
    new optimizer to train the adapter.

    Args:
        model: An adapted model.
        name: The adapter.

    Raises:
        ValueError: There is no such adapter, or the model is wrapped.
    """
    injection = require(model, name)
    parts = injection.adapters[name].parts
    frozen = vars(model).get(FrozenParts.KEY)
    if parts is not None and frozen is not None:
        frozen.release()  # before the parts are held, which it would train again
    injection.activate(name)
    if parts is None:
        return
    for part, module in parts.items():
        _set_part(model, part, module.train(model.training))
    _register_parts(model, injection)
    names = injection.selection.frozen_names(beside(model, injection))
    if names:
        FrozenParts(model, names)


def _register_parts(model: nn.Module, injection: Injection) -> None:
    """Register necks and heads of inactive adapters in the model, for ``.to()`` and ``state_dict()``."""
    if hasattr(model, PARTS):
        delattr(model, PARTS)
    waiting = {
        escape(name): nn.ModuleDict({escape(path): part for path, part in adapter.parts.items()})
        for name, adapter in injection.adapters.items()
        if adapter.parts and name != injection.active
    }
    if waiting:
        setattr(model, PARTS, nn.ModuleDict(waiting))


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the backbone as the base within the context, exactly as before the injection.

    Neck and head remain those of the active adapter.

    Args:
        model: An adapted model.

    Raises:
        ValueError: The model is not adapted, it is wrapped, or parameters of its base are trained (``unfreeze``).

    Example:
        >>> with disabled(model):
        ...     base_features = model.extract_feat(images)
    """
    injection = require(model)
    injection.check_unchanged('disabled()')
    with ExitStack() as stack:
        for each in injections_of(model):
            stack.enter_context(each.switch.off())
        yield model


def delete_adapter(model: nn.Module, name: str) -> None:
    """Delete an adapter.

    After the active adapter is deleted, the backbone runs as the base and stays frozen.
    After the last adapter is deleted, the backbone is as before the first, not frozen.

    Args:
        model: An adapted model.
        name: The adapter.

    Raises:
        ValueError: There is no such adapter, or the model is wrapped.
    """
    injection = require(model, name)
    if len(injection.adapters) == 1:
        remove(model)
        return
    injection.delete(name)
    _register_parts(model, injection)
