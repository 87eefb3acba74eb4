"""The registry of PEFT methods, and how our parts reach the registries of the mm libraries.

``PEFT_METHODS`` holds the named recipes that say which adapter goes where and what else is trained. MMEngine gives a
scope one child of ``MODELS``; methods are no modules, so theirs stands alone.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmengine.registry import Registry

PEFT_METHODS = Registry('PEFT method', scope='iconformer_mm', locations=['iconformer_mm.tuning'])


def register_with(library: str, registry: str, module: str) -> None:
    """Have one of our modules imported when a library's registry first needs its parts.

    A registry imports the modules on its list of locations at its first
    look-up; ours joins that list. So nothing of a library is built up before
    it is used, and a library that is not installed is left out.

    Args:
        library: Package of the mm library, e.g. ``'mmpretrain'``.
        registry: Name of the registry there, e.g. ``'MODELS'``.
        module: Import path of the module whose classes register themselves.
    """
    if find_spec(library) is None:
        return
    target = getattr(import_module(f'{library}.registry'), registry)
    if target._imported:
        import_module(module)
    elif module not in target._locations:
        target._locations.append(module)


def type_name(part: Any) -> str:
    """Name of the class that a part of a config asks for.

    A ``type`` is a name (``'PEFTHook'``), a name with a scope or a package before it, a class, or, in MMEngine's
    pure-Python configs, an object that is imported later.

    Args:
        part: A config with a ``type``, or what is already built.

    Returns:
        The bare name, empty for a config without a ``type``.
    """
    kind = part.get('type') if isinstance(part, Mapping) else type(part)
    if kind is None:
        return ''
    return getattr(kind, '__name__', None) or str(kind).rpartition('.')[2]


def is_type(part: Any, *names: str) -> bool:
    """Whether a part of a config asks for one of some classes; a class that is derived from one counts, too.

    Args:
        part: A config with a ``type``, or what is already built; see :func:`type_name`.
        *names: Bare names of classes.
    """
    kind = part.get('type') if isinstance(part, Mapping) else type(part)
    found = {base.__name__ for base in kind.__mro__} if isinstance(kind, type) else {type_name(part)}
    return not found.isdisjoint(names)


def accepted(target: Any) -> set[str]:
    """Names of the arguments that a class or a function takes; with ``**kwargs``, those of the base classes, too."""
    functions = [target]
    if isinstance(target, type):
        functions = [vars(base)['__init__'] for base in target.__mro__ if '__init__' in vars(base)]
    names: set[str] = set()
    for function in functions:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            break
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {'self'}


def __getattr__(name: str) -> Any:
    """``ADAPTERS``, in which methods outside of this package still register their adapters; nothing reads it."""
    if name != 'ADAPTERS':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    warnings.warn(
        f'{__name__}.ADAPTERS is deprecated and goes in a later release: adapters need not be registered, the '
        '`adapter_class` of a method is enough',
        DeprecationWarning,
        stacklevel=2,
    )
    globals()[name] = Registry('adapter', scope='iconformer_mm')
    return globals()[name]
