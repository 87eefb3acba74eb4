"""What a PEFT method is, and how one is made from its name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
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
        name: The name it was asked for by.
        freezes: Whether the backbone's own parameters are frozen.
        adapts: Whether modules get adapters.
        needs_blocks: Whether it cannot do without known Transformer blocks.
    """

    name: str
    freezes = True
    adapts = True
    needs_blocks = True

    def __init__(self) -> None:
        """Take no options."""

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """The options the method takes, with their defaults."""
        return defaults_of(cls.__init__)

    @property
    def options(self) -> dict[str, Any]:
        """The options that make this method again, defaults included."""
        return {name: getattr(self, name) for name in self.option_defaults()}

    @property
    def config(self) -> dict[str, Any]:
        """The config that makes this method again, for :func:`build_method`."""
        return dict(type=self.name, **self.options)

    def make_attachments(self, backbone: nn.Module, sites: list[Site], tracker_of: TrackerOf) -> list[Attachment]:
        """Make what is to be attached to a backbone.

        Args:
            backbone: The backbone.
            sites: Its blocks.
            tracker_of: Gives the tracker of a block's host. It raises a ValueError where the host
                has none, so it is asked only if the grid is needed.

        Returns:
            Attachments, not yet installed; no two of one module.

        Raises:
            ValueError: The method is not defined for this backbone.
        """
        return []


def defaults_of(function: Callable) -> dict[str, Any]:
    """The arguments of a function that have defaults, with these."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@PEFT_METHODS.register_module(name='full')
class FullFineTuning(PEFTMethod):
    """Full fine-tuning: nothing is frozen, nothing added."""

    freezes = False
    adapts = False


@PEFT_METHODS.register_module(name='frozen')
class FrozenBackbone(PEFTMethod):
    """Linear probing: the backbone is frozen, only neck and head are trained."""

    adapts = False


def build_method(method: str | dict, **options: Any) -> PEFTMethod:
    """Make a method from its name or config, with one clear error for each mistake.

    Args:
        method: A name (``'icon'``) or a config (``dict(type='icon', ...)``).
        **options: Options of the method, over those of the config.

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
    known = PEFT_METHODS.module_dict
    if isinstance(name, type):  # as pure-Python configs have it
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


def _hint(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word), list(words), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ''
