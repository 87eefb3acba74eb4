"""The base class of PEFT methods, and how to build one from its name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from iconformer_mm.registry import PEFT_METHODS

from ..attachments import Attachment
from ..grids import GridTracker
from ..sites import Site

TrackerOf = Callable[[Site], GridTracker | None]


class PEFTMethod:
    """A recipe that :func:`iconformer_mm.inject` carries out.

    Attributes:
        name: The registered name of the method.
        freezes: Whether the backbone's own parameters are frozen. Defaults to True.
        adapts: Whether modules get adapters. Defaults to True.
        needs_blocks: Whether the method requires known Transformer blocks, or layers known by structure in a tower
            that has no such blocks (:meth:`make_tower_attachments`). Defaults to True.
    """

    name: str
    freezes = True
    adapts = True
    needs_blocks = True

    def __init__(self) -> None:
        """Take no options."""

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return the method's options with their defaults."""
        return defaults_of(cls.__init__)

    @property
    def options(self) -> dict[str, Any]:
        """The options to rebuild this method, defaults included."""
        return {name: getattr(self, name) for name in self.option_defaults()}

    @property
    def config(self) -> dict[str, Any]:
        """The config to rebuild this method with :func:`build_method`."""
        return dict(type=self.name, **self.options)

    def make_attachments(self, backbone: nn.Module, sites: list[Site], tracker_of: TrackerOf) -> list[Attachment]:
        """Create the attachments for a backbone.

        Args:
            backbone: The backbone.
            sites: Its blocks.
            tracker_of: Returns the tracker of a block's host. It raises a ValueError if the host
                has none, so call it only if the adapter needs the grid.

        Returns:
            The attachments, not yet installed, at most one per module.

        Raises:
            ValueError: The method is not defined for this backbone.
        """
        return []

    def make_tower_attachments(self, tower: nn.Module) -> list[Attachment]:
        """Create the attachments for a tower without known blocks, such as a decoder or a text encoder.

        Args:
            tower: The tower.

        Raises:
            ValueError: The method is not defined for it.
        """
        raise ValueError(
            f"method '{self.name}' needs the blocks of an image encoder, and {type(tower).__name__} has none that is "
            'known. For other towers use lora, dora, bitfit, norm, ssf, adaptformer, adapter or lorand. Make the '
            'blocks of an own image encoder known by register_family'
        )

    def of(self, path: str) -> PEFTMethod:
        """Return the method of one tower. Only :class:`Towers` has several.

        Args:
            path: The tower's path in the model.
        """
        return self


def defaults_of(function: Callable) -> dict[str, Any]:
    """Return the arguments of a function that have defaults, with the defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@PEFT_METHODS.register_module(name='full')
class FullFineTuning(PEFTMethod):
    """Full fine-tuning: nothing is frozen and nothing is added."""

    freezes = False
    adapts = False


@PEFT_METHODS.register_module(name='frozen')
class FrozenBackbone(PEFTMethod):
    """Linear probing: the backbone is frozen, and only neck and head are trained."""

    adapts = False


class Towers(PEFTMethod):
    """A method for each tower of a model (ours).

    It is not registered, because it is written as ``methods=[...]``. Towers that it does not name stay frozen.

    Args:
        methods: The methods, by the paths of their towers.

    Raises:
        ValueError: A method trains its tower itself.
    """

    name = 'towers'

    def __init__(self, methods: Mapping[str, PEFTMethod]) -> None:
        self.methods = dict(methods)
        for path, method in self.methods.items():
            if not method.freezes:
                raise ValueError(
                    f"methods: '{method.name}' for {path!r} trains all of it in place. Leave {path!r} out of the list: "
                    'what is in no tower is trained as it is'
                )
        self.adapts = any(method.adapts for method in self.methods.values())
        self.needs_blocks = any(method.needs_blocks for method in self.methods.values())

    @property
    def options(self) -> dict[str, Any]:
        """The methods with their towers, as :func:`build_method` takes them."""
        return dict(methods=[dict(where=[path], **method.config) for path, method in self.methods.items()])

    def of(self, path: str) -> PEFTMethod:
        """Return the method of one tower; for one that it does not name, ``frozen``."""
        return self.methods.get(path) or _FROZEN


def build_method(method: str | dict, **options: Any) -> PEFTMethod:
    """Build a method from its name or config.

    Args:
        method: A name (``'icon'``) or a config (``dict(type='icon', ...)``).
        **options: Options of the method. They override those of the config.

    Raises:
        ValueError: The method or an option is unknown.
    """
    if isinstance(method, str):
        name = method
    else:
        options = {**method, **options}
        name = options.pop('type', None)
        if name is None:
            raise ValueError(f"a PEFT method's config needs a type, e.g. dict(type='icon'); got {options}")
    if name == Towers.name:
        return _build_towers(**options)
    known = PEFT_METHODS.module_dict
    if isinstance(name, type):  # as in pure-Python configs
        name = next((each for each, cls in known.items() if cls is name), name.__name__)
    if name not in known:
        raise ValueError(f"unknown PEFT method '{name}'{_hint(name, known)}; known: {', '.join(sorted(known))}")
    takes = list(known[name].option_defaults())
    for option in options:
        if option not in takes:
            hint = f'its options: {", ".join(takes)}' if takes else 'it takes none'
            raise ValueError(f"unknown option '{option}' of PEFT method '{name}'{_hint(option, takes)}; {hint}")
    built = known[name](**options)
    built.name = name
    return built


def _build_towers(methods: Any = None, **unknown: Any) -> Towers:
    """Build the methods of several towers, each a config with ``where``, a list of paths."""
    if unknown or not isinstance(methods, Sequence) or not methods:
        raise ValueError(f"'{Towers.name}' takes `methods`, a list of dict(where=[...], type=...); got {methods!r}")
    built: dict[str, PEFTMethod] = {}
    for entry in methods:
        if not isinstance(entry, Mapping) or not isinstance(entry.get('where'), (list, tuple)):
            raise ValueError(f'each of `methods` is a dict(where=[...], type=...); got {entry!r}')
        options = dict(entry)
        paths = options.pop('where')
        for path in paths:
            if path in built:
                raise ValueError(f'methods: {path!r} is given two methods, the first is {built[path].name!r}')
            built[path] = build_method(options)
    return Towers(built)


_FROZEN = build_method('frozen')


def _hint(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(words), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ''
