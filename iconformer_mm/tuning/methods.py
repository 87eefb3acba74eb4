"""The named PEFT methods: which adapter goes where, and what else is trained."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from iconformer_mm.adapters import Adapter, AdaptFormerAdapter, ICoNAdapter
from iconformer_mm.registry import PEFT_METHODS

from .sites import Site


class PEFTMethod:
    """A recipe that :func:`iconformer_mm.inject` carries out.

    Attributes:
        name: The name it was asked for by.
        freezes: Whether the backbone's own parameters are frozen.
        adapts: Whether blocks get adapters.
    """

    name: str
    freezes = True
    adapts = False

    def __init__(self) -> None:
        """Take no options."""

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options the method takes."""
        return [name for name in inspect.signature(cls.__init__).parameters if name != 'self']

    @property
    def options(self) -> dict[str, Any]:
        """The options that make this method again."""
        return {}

    @property
    def config(self) -> dict[str, Any]:
        """The config that makes this method again, for :func:`build_method`."""
        return dict(type=self.name, **self.options)


@PEFT_METHODS.register_module(name='full')
class FullFineTuning(PEFTMethod):
    """Full fine-tuning: nothing is frozen, nothing added."""

    freezes = False


@PEFT_METHODS.register_module(name='frozen')
class FrozenBackbone(PEFTMethod):
    """Linear probing: the backbone is frozen, only neck and head are trained."""


class ParallelAdapterMethod(PEFTMethod):
    """An adapter parallel to every FFN, in a frozen backbone.

    Args:
        input: What the adapter reads: ``'normed'`` for LN2(x'), ``'residual'``
            for x'. In post-norm blocks (SwinV2) both are x'.
        **adapter_options: Arguments of the adapter.
    """

    adapts = True
    adapter_class: type[Adapter]
    default_input = 'normed'

    def __init__(self, input: str | None = None, **adapter_options: Any) -> None:
        self.input = self.default_input if input is None else input
        if self.input not in ('normed', 'residual'):
            raise ValueError(f"input must be 'normed' or 'residual', got {input!r}")
        self.adapter_options = adapter_options

    @classmethod
    def option_names(cls) -> list[str]:
        """Names of the options the method takes."""
        arguments = inspect.signature(cls.adapter_class.__init__).parameters
        return ['input'] + [name for name in arguments if name not in ('self', 'embed_dims')]

    @property
    def options(self) -> dict[str, Any]:
        """The options that make this method again, defaults included."""
        arguments = inspect.signature(self.adapter_class.__init__).parameters.values()
        defaults = {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}
        return {'input': self.input, **defaults, **self.adapter_options}

    def build_adapter(self, site: Site) -> Adapter:
        """Make the adapter of one site."""
        return self.adapter_class(site.embed_dims, **self.adapter_options)


@PEFT_METHODS.register_module(name='icon')
class ICoNMethod(ParallelAdapterMethod):
    """iConFormer (arXiv 2409.02838): an :class:`ICoNAdapter` parallel to every FFN.

    The placement and the default ``input='normed'`` are ours.
    """

    adapter_class = ICoNAdapter


@PEFT_METHODS.register_module(name='adaptformer')
class AdaptFormerMethod(ParallelAdapterMethod):
    """AdaptFormer (Chen et al., NeurIPS 2022), which reads the residual stream."""

    adapter_class = AdaptFormerAdapter
    default_input = 'residual'


def build_method(method: str | dict, **options: Any) -> PEFTMethod:
    """Make a method from its name or config, with one clear error for each mistake.

    Args:
        method: A name (``'icon'``) or a config (``dict(type='icon', ...)``).
        **options: Options of the method, over those of the config.

    Raises:
        ValueError: The method or an option is unknown.
    """
    if not isinstance(method, str):
        options = {**method, **options}
        method = options.pop('type', None)
        if method is None:
            raise ValueError(f"a PEFT method's config needs a type, e.g. dict(type='icon'); got {options}")
    known = PEFT_METHODS.module_dict
    if method not in known:
        raise ValueError(f"unknown PEFT method '{method}'{_hint(method, known)}; known: {', '.join(sorted(known))}")
    names = known[method].option_names()
    for name in options:
        if name not in names:
            takes = f'its options: {", ".join(names)}' if names else 'it takes none'
            raise ValueError(f"unknown option '{name}' of PEFT method '{method}'{_hint(name, names)}; {takes}")
    built = known[method](**options)
    built.name = method
    return built


def _hint(word: str, words) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ''
