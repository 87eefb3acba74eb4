"""Which tensors of a model are its base, which were trained in its backbones, and which lie outside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from iconformer_mm.tuning.backbones import borrowed_modules, find_backbones, find_classifiers, is_below, join
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import (
    PARTS,
    Injection,
    backbones_of,
    classifiers_of,
    escape,
    get_injection,
    outside_of,
    unwrap,
)
from iconformer_mm.tuning.selection import Selection

BACKBONE = 'backbone'


def file_names(names: Iterable[str], backbones: Sequence[str], heads: Iterable[str] = ()) -> dict[str, str]:
    """Map the names of tensors in the model to their names in an adapter file.

    A single backbone is called ``backbone`` in files, whatever its path in the model. The exception is a model that
    uses this name for something else: there, all names stay as they are.

    Args:
        names: Names in the model.
        backbones: Paths of the backbones in the model.
        heads: Names of the heads that lie inside a backbone.
    """
    names, heads = list(names), list(heads)
    if len(backbones) > 1:
        return {name: name for name in names}
    (path,) = backbones

    def is_inside(name: str) -> bool:
        return (not path or is_below(name, [path])) and not is_below(name, heads)

    if any(is_below(name, [BACKBONE]) and not is_inside(name) for name in names if path and path != BACKBONE):
        return {name: name for name in names}
    start = len(path) + 1 if path else 0
    return {name: join(BACKBONE, name[start:]) if is_inside(name) else name for name in names}


def heads_of(model: nn.Module, selection: Selection | None = None) -> list[str]:
    """Return the names of the classifiers that lie inside a model's backbones.

    Args:
        model: The model.
        selection: The selection that an unadapted model would be adapted with.
    """
    model = unwrap(model)
    injection = get_injection(model)
    if injection is not None:
        return [join(path, n) for path, b in backbones_of(model).items() for n in classifiers_of(injection, b)]
    if selection is not None and not selection.classifiers:
        return []
    return [join(path, n) for path, b in _backbones(model, selection).items() for n in find_classifiers(b)]


def _backbones(model: nn.Module, selection: Selection | None) -> dict[str, nn.Module]:
    if get_injection(model) is not None or selection is None:
        return backbones_of(model)
    return find_backbones(model, selection.backbones)


def base_state(model: nn.Module, selection: Selection | None = None, with_trained: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a model's backbones that are not trained, by their names in the backbone.

    With several backbones, each name starts with the backbone's path.

    Args:
        model: The model, adapted or not.
        selection: The selection that an unadapted model would be adapted with. Defaults to None: its backbones are
            base as a whole.
        with_trained: Whether to include the backbones' own tensors that are trained in place. Defaults to False.
    """
    model = unwrap(model)
    injection = get_injection(model)
    backbones = _backbones(model, selection)
    state = {}
    for path, backbone in backbones.items():
        if injection is not None:
            outside = outside_of(injection, backbone)
            trained = injection.trained_of(backbone)
        else:
            chosen = selection or Selection()
            outside = [*find_classifiers(backbone), *borrowed_modules(backbone)] if chosen.classifiers else []
            trained = chosen.trained_names(backbone, outside)
        for name, value in backbone.state_dict().items():
            if is_adapter(name) or is_below(name, outside):
                continue
            if with_trained or name not in trained:
                state[join(path, name) if len(backbones) > 1 else name] = value.detach()
    return state


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the base in an adapted model's state dict. Adapter files and checkpoints leave it out.

    Modules outside the backbones do not belong to it, even if they are frozen: a file of the base need not hold them.
    """
    model = unwrap(model)
    injection = get_injection(model)
    names: set[str] = set()
    for path, backbone in backbones_of(model).items():
        outside = classifiers_of(injection, backbone) if injection else find_classifiers(backbone)
        trained = injection.trained_of(backbone) if injection else []
        names |= {
            join(path, name)
            for name in backbone.state_dict()
            if not is_adapter(name) and name not in trained and not is_below(name, outside)
        }
    return {name: value for name, value in model.state_dict().items() if name in names}


def tuned_state(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of an adapter file, by their names in the file.

    They are the tensors of one adapter with its neck and head. They share memory with the model.

    Args:
        model: The model.
        adapter: The adapter, active or not. Defaults to None: the active one.

    Raises:
        ValueError: The model's ``state_dict()`` lacks tensors of an adapter.
    """
    model = unwrap(model)
    state = model.state_dict()
    backbones = backbones_of(model)
    for path, backbone in backbones.items():
        lost = [n for n, _ in backbone.named_parameters() if is_adapter(n) and join(path, n) not in state]
        if lost:
            raise ValueError(
                f'{type(model).__name__} leaves {len(lost)} adapter tensors out of its state_dict(), such as '
                f'{lost[0]}: the file would lack them. One of its modules drops the tensors that it did not define'
            )
    base = frozen_state(model).keys()
    state = {name: value for name, value in state.items() if name not in base}
    injection = get_injection(model)
    if injection is not None:
        state = _of_adapter(state, injection, backbones, adapter or injection.active)
    names = file_names(state, list(backbones), heads_of(model))
    return {names[name]: value for name, value in state.items()}


def _of_adapter(
    state: dict[str, Tensor], injection: Injection, backbones: dict[str, nn.Module], wanted: str | None
) -> dict[str, Tensor]:
    """Drop the tensors of other adapters, and rename the wanted one's as if it were the only adapter."""
    paths = {id(module): path for path, module in backbones.items()}
    renamed: dict[str, str | None] = {PARTS: None}
    for name, adapter in injection.adapters.items():
        for own_path, attachment in zip(adapter.paths, adapter.attachments):
            path = paths[id(injection.backbones[own_path])]
            for key in attachment.adapters:
                alone = join(path, attachment.path(key))
                renamed[alone + attachment.suffix] = alone if name == wanted else None
    if wanted is not None and wanted != injection.active:
        for part in injection.adapters[wanted].parts or ():
            renamed[part] = None  # belongs to the active adapter
            renamed[f'{PARTS}.{escape(wanted)}.{escape(part)}'] = part
    kept = {}
    for name, value in state.items():
        prefix = next((p for p in _prefixes(name) if p in renamed), None)
        if prefix is None:
            kept[name] = value
        elif renamed[prefix] is not None:
            kept[f'{renamed[prefix]}{name[len(prefix) :]}'] = value
    return kept


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of the modules that contain a tensor, innermost first."""
    words = name.split('.')
    return ('.'.join(words[:end]) for end in range(len(words) - 1, 0, -1))
