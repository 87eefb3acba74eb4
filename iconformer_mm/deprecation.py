"""Names that have moved keep working for a release, with a warning that names the new place."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def moved(module: str, places: Mapping[str, Sequence[str]], rest: str | None = None) -> Callable[[str], Any]:
    """A module's ``__getattr__`` for names that are elsewhere now; each warns once.

    Args:
        module: The old module.
        places: The names by the modules that have them now.
        rest: The module that has all other names. Defaults to None, for no other names.

    Example:
        >>> __getattr__ = moved(__name__, {'iconformer_mm.inference': ['AdapterInferencer']})
    """
    new_places = {name: place for place, names in places.items() for name in names}

    def find(name: str) -> Any:
        place = new_places.get(name, rest)
        if place is None or name.startswith('__') or not hasattr(import_module(place), name):
            raise AttributeError(f'module {module!r} has no attribute {name!r}')
        warnings.warn(
            f'{module}.{name} has moved to {place}.{name}; the old name goes in a later release',
            DeprecationWarning,
            stacklevel=2,
        )
        value = getattr(import_module(place), name)
        setattr(sys.modules[module], name, value)  # found without a warning from now on
        return value

    return find
