"""Which modules of a model are adapted: paths and patterns, with one method for all or one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from .backbones import find_backbones, is_below, near, unwrap
from .methods import PEFTMethod, Towers, build_method

BACKBONE = 'backbone'


def find_towers(model: nn.Module, where: str | Sequence[str]) -> tuple[str, ...]:
    """List the paths of the modules that a path, a pattern or a list of them names.

    A pattern names the outermost modules that fit it. ``'backbone'`` also names a backbone of another path.

    Args:
        model: The model.
        where: Paths (``'encoder'``) or shell patterns (``'*_model'``, where ``*`` stands for dots, too).

    Returns:
        The paths, in the order of ``where``. Those of one pattern are in the order of the model.

    Raises:
        ValueError: It is no such list, or something in it names no module with parameters.
    """
    entries = [where] if isinstance(where, str) else where
    if not isinstance(entries, (list, tuple)) or not entries or not all(isinstance(e, str) for e in entries):
        raise ValueError(f"where must be a module's path or pattern, or a list of such (['encoder']), got {where!r}")
    host = unwrap(model)
    modules = {n: m for n, m in host.named_modules() if any(True for _ in m.parameters())}
    paths: list[str] = []
    for entry in entries:
        found: list[str] = [entry] if entry in modules else []
        if not found and entry == BACKBONE:
            found = list(find_backbones(host))
        for path in modules if not found else ():
            if path and fnmatchcase(path, entry) and not is_below(path, found):
                found.append(path)
        if not found:
            there = ', '.join(f'{n!r} ({type(m).__name__})' for n, m in host.named_children() if n in modules)
            raise ValueError(
                f'where: no module of {type(host).__name__} with parameters fits {entry!r}{near(entry, modules)}; '
                f'there is: {there or "nothing"}'
            )
        paths += [path for path in found if path not in paths]
    for path in paths:
        outer = next((other for other in paths if other != path and (is_below(path, [other]) or not other)), None)
        if outer is not None:
            raise ValueError(f'where: {path!r} lies within {outer!r}, and both are named; name one of them')
    return tuple(paths)


def build_towers(model: nn.Module, methods: Sequence[Mapping[str, Any]]) -> tuple[PEFTMethod, tuple[str, ...]]:
    """Build the methods of a model's towers.

    Args:
        model: The model.
        methods: A config for each method, with ``where``: ``dict(where=['encoder'], type='lora', rank=16)``.
            ``where`` defaults to the backbone.

    Returns:
        A method for all, and the paths of the towers. If the towers have one and the same method, it is that method.

    Raises:
        ValueError: A config is wrong, names nothing in the model, or names what another one names.
    """
    if isinstance(methods, (str, Mapping)) or not isinstance(methods, Sequence) or not methods:
        raise ValueError(f"methods must be a list of dict(where=[...], type='lora', ...), got {methods!r}")
    built: dict[str, PEFTMethod] = {}
    for entry in methods:
        if not isinstance(entry, Mapping) or 'type' not in entry:
            raise ValueError(f"methods must be a list of dict(where=[...], type='lora', ...), got {entry!r} in it")
        options = dict(entry)
        where = options.pop('where', BACKBONE)
        method = build_method(options)
        for path in find_towers(model, where):
            for other, known in built.items():
                if other == path:
                    raise ValueError(f"methods: {path!r} is given two methods, '{known.name}' and '{method.name}'")
                if is_below(path, [other]) or is_below(other, [path]) or '' in (path, other):
                    inner, outer = sorted((path, other), key=len, reverse=True)
                    raise ValueError(
                        f'methods: {inner!r} lies within {outer!r}, and a module takes one method; name modules that '
                        'do not overlap'
                    )
            built[path] = method
    first = next(iter(built.values()))
    same = all(method.config == first.config for method in built.values()) and first.freezes
    return first if same else Towers(built), tuple(built)
