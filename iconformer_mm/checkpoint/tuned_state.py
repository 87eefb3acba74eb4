"""Which tensors of a model are its base, what was trained of its backbones, and what stands beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor, nn

from iconformer_mm.tuning.backbones import find_backbones, find_classifiers, is_below, join
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import PARTS, Injection, backbones_of, escape, get_injection, outside_of, unwrap
from iconformer_mm.tuning.selection import Selection

BACKBONE = 'backbone'


def file_names(names: Iterable[str], backbones: Sequence[str], heads: Iterable[str] = ()) -> dict[str, str]:
    """Names of tensors in an adapter file, by their names in the model.

    In files a single backbone is ``backbone``, whatever its path in the model, unless that name is another's there.

    Args:
        names: Names in the model.
        backbones: Paths of the backbones in the model.
        heads: Names of modules that lie in a backbone and are heads.
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
    """Names in the model of the classifiers that lie in its backbones.

    Args:
        model: The model.
        selection: What an unadapted model would be adapted with.
    """
    model = unwrap(model)
    injection = get_injection(model)
    if injection is not None:
        return [join(path, n) for path, b in backbones_of(model).items() for n in outside_of(injection, b)]
    if selection is not None and not selection.classifiers:
        return []
    return [join(path, n) for path, b in _backbones(model, selection).items() for n in find_classifiers(b)]


def _backbones(model: nn.Module, selection: Selection | None) -> dict[str, nn.Module]:
    if get_injection(model) is not None or selection is None:
        return backbones_of(model)
    return find_backbones(model, selection.backbones)


def base_state(model: nn.Module, selection: Selection | None = None, with_trained: bool = False) -> dict[str, Tensor]:
    """The tensors of a model's backbones that are not trained, by their names in the backbone.

    Of several backbones the names have the path before them.

    Args:
        model: The model, adapted or not.
        selection: What an unadapted model would be adapted with. Defaults to None: all of its backbones are base.
        with_trained: Whether to have the backbones' own tensors that are trained in place, too. Defaults to False.
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
            outside = find_classifiers(backbone) if chosen.classifiers else []
            trained = chosen.trained_names(backbone, outside)
        for name, value in backbone.state_dict().items():
            if is_adapter(name) or is_below(name, outside):
                continue
            if with_trained or name not in trained:
                state[join(path, name) if len(backbones) > 1 else name] = value.detach()
    return state


def frozen_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of an adapted model's state dict that is its base, which what was trained is saved without.

    What stands beside the backbones is no part of it, frozen or not: no file of the base is sure to hold that.
    """
    model = unwrap(model)
    injection = get_injection(model)
    names: set[str] = set()
    for path, backbone in backbones_of(model).items():
        outside = outside_of(injection, backbone) if injection else find_classifiers(backbone)
        trained = injection.trained_of(backbone) if injection else []
        names |= {
            join(path, name)
            for name in backbone.state_dict()
            if not is_adapter(name) and name not in trained and not is_below(name, outside)
        }
    return {name: value for name, value in model.state_dict().items() if name in names}


def tuned_state(model: nn.Module, adapter: str | None = None) -> dict[str, Tensor]:
    """The tensors that an adapter file holds, by the names they have there.

    They are those of one adapter, with its neck and head. They share memory with the model's.

    Args:
        model: The model.
        adapter: The adapter, active or not. Defaults to None: the active one.

    Raises:
        ValueError: The model keeps an adapter's tensor to itself.
    """
    model = unwrap(model)
    state = model.state_dict()
    backbones = backbones_of(model)
    for path, backbone in backbones.items():
        lost = [n for n, _ in backbone.named_parameters() if is_adapter(n) and join(path, n) not in state]
        if lost:
            raise ValueError(
                f'{type(model).__name__} leaves {len(lost)} adapter tensors out of its state_dict(), such as '
                f'{lost[0]}: the file would lack them. A module in it drops what is not its own'
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
    """Without what is of other adapters; the wanted one's tensors by the names that they have as the only adapter."""
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
            renamed[part] = None  # that of the active adapter
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
    """Names of the modules that a tensor lies in, the innermost first."""
    words = name.split('.')
    return ('.'.join(words[:end]) for end in range(len(words) - 1, 0, -1))
