"""Methods that place adapters parallel to attention and FFN, or after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from iconformer_mm import adapters
from iconformer_mm.registry import PEFT_METHODS

from ..attachments import ATTENTION, FFN, INPUTS, Attachment, BranchAttachment, ModuleBranchAttachment
from ..sites import Site
from ..structure import Branch, find_branches
from .base import PEFTMethod, TrackerOf, defaults_of


class AdapterMethod(PEFTMethod):
    """Adapters at branches of every block, in a frozen backbone.

    Args:
        input: What an adapter reads. Parallel to the branch: ``'normed'`` for
            ``LN(x)``, which the branch reads, or ``'residual'`` for ``x``. In post-norm
            blocks (SwinV2) both are ``x``. After the branch: ``'output'`` for the branch's
            output, or ``'sum'`` for the output plus ``x``. None (default) selects the
            method's default.
        sites: The branches that get an adapter: ``'ffn'``, ``'attention'``. None
            (default) selects the method's default.
        **adapter_options: Arguments of the adapter.

    Raises:
        ValueError: An option is out of its range.
    """

    adapter_class: type[adapters.Adapter]
    default_input: str
    default_sites: tuple[str, ...]

    def __init__(self, input: str | None = None, sites: Sequence[str] | None = None, **adapter_options: Any) -> None:
        self.input = self.default_input if input is None else input
        self.sites = list(self.default_sites if sites is None else sites)
        if self.input not in INPUTS:
            raise ValueError(f'input must be one of {", ".join(INPUTS)}, got {input!r}')
        if isinstance(sites, str) or not self.sites or not set(self.sites) <= {ATTENTION, FFN}:
            raise ValueError(f"sites must be a list of '{ATTENTION}' and '{FFN}', got {sites!r}")
        self.sites = sorted(set(self.sites))
        self.adapter_options = adapter_options

    @classmethod
    def _adapter_defaults(cls) -> dict[str, Any]:
        return defaults_of(cls.adapter_class.__init__)

    @classmethod
    def option_defaults(cls) -> dict[str, Any]:
        """Return the method's options with their defaults."""
        return dict(input=cls.default_input, sites=list(cls.default_sites), **cls._adapter_defaults())

    @property
    def options(self) -> dict[str, Any]:
        """The options to rebuild this method, defaults included."""
        return dict(input=self.input, sites=self.sites, **{**self._adapter_defaults(), **self.adapter_options})

    def make_attachments(self, backbone: nn.Module, sites: list[Site], tracker_of: TrackerOf) -> list[Attachment]:
        """Create the adapters of every block."""
        attachments: list[Attachment] = []
        for site in sites:
            branches = [branch for branch in self.sites if self._fits(site, branch)]
            if branches:
                made = {branch: self.adapter_class(site.embed_dims, **self.adapter_options) for branch in branches}
                tracker = tracker_of(site) if self.adapter_class.needs_grid else None
                attachments.append(BranchAttachment(site, made, self.input, tracker))
        if sites and not attachments:
            block = sites[0]
            raise ValueError(
                f'{block.family.name} blocks have no {" or ".join(self.sites)} that supports an adapter of method '
                f"'{self.name}'; they have {', '.join(block.branches)}, so set "
                f'sites={list(block.branches)}'
            )
        return attachments

    def make_tower_attachments(self, tower: nn.Module) -> list[Attachment]:
        """Create the adapters at attention and FFNs that are known by structure."""
        branches = find_branches(tower)
        chosen = [branch for branch in branches if branch.kind in self.sites]
        kind = type(tower).__name__
        if not chosen:
            there = sorted({branch.kind for branch in branches})
            raise ValueError(
                f"method '{self.name}' adapts {' and '.join(self.sites)}, and {kind} has "
                + (f'{there[0]} only; set sites={there}' if there else 'no attention or FFN that is known by structure')
                + '. Low-rank methods (lora, dora) fit any linear layer'
            )
        if self.adapter_class.needs_grid and not all(branch.has_levels for branch in chosen):
            raise ValueError(
                f"method '{self.name}' filters tokens on the grid of an image, and those of {kind} lie on none that is "
                "known. It fits image encoders, and with sites=['attention'] the encoder of the Deformable DETR "
                'family. Use lora, dora, adaptformer, adapter, bitfit or norm here'
            )
        return [self._at_module(branch) for branch in chosen]

    def _at_module(self, branch: Branch) -> ModuleBranchAttachment:
        made = self.adapter_class(branch.embed_dims, **self.adapter_options)
        if not branch.reads_residual or self.input in ('normed', 'residual'):
            return ModuleBranchAttachment(branch, made, self.input)
        if self.input == 'sum':
            raise ValueError(
                f"{type(branch.module).__name__} adds its branch and applies a norm in one call, so input='sum' has no "
                "place; set input='output' or 'residual'"
            )
        # What the dense layer returns is the branch.
        dense = Branch(f'{branch.name}.dense', branch.module.get_submodule('dense'), branch.kind, branch.embed_dims)
        return ModuleBranchAttachment(dense, made, 'sum')

    def _fits(self, site: Site, branch: str) -> bool:
        """Whether a block supports an adapter at a branch.

        An adapter cannot be parallel to attention that changes the number of tokens.
        """
        parallel = branch == ATTENTION and self.input in ('normed', 'residual')
        return branch in site.branches and not (parallel and site.reshapes)


@PEFT_METHODS.register_module(name='icon')
class ICoNMethod(AdapterMethod):
    """iConFormer (arXiv 2409.02838): an :class:`ICoNAdapter` parallel to the attention of every block.

    The placement and the default ``input='normed'`` are ours. See docs/comparison_small.md for the evidence.
    """

    adapter_class = adapters.ICoNAdapter
    default_input = 'normed'
    default_sites = (ATTENTION,)


@PEFT_METHODS.register_module(name='icon-static')
class StaticICoNMethod(ICoNMethod):
    """iCoN with learned kernels that are the same for all inputs: the baseline for input conditioning (ours)."""

    @classmethod
    def _adapter_defaults(cls) -> dict[str, Any]:
        generator = ('pooling', 'window_size', 'generator_layers', 'generator_bias')
        defaults = {name: value for name, value in super()._adapter_defaults().items() if name not in generator}
        return {**defaults, 'kernel': 'static'}

    def __init__(self, input: str | None = None, sites: Sequence[str] | None = None, **adapter_options: Any) -> None:
        if adapter_options.setdefault('kernel', 'static') != 'static':
            raise ValueError("kernel must be 'static' in icon-static; the method with dynamic kernels is 'icon'")
        super().__init__(input, sites, **adapter_options)


@PEFT_METHODS.register_module(name='adaptformer')
class AdaptFormerMethod(AdapterMethod):
    """AdaptFormer (Chen et al., NeurIPS 2022): parallel to every FFN, reading the residual stream."""

    adapter_class = adapters.AdaptFormerAdapter
    default_input = 'residual'
    default_sites = (FFN,)


@PEFT_METHODS.register_module(name='adapter')
class HoulsbyMethod(AdapterMethod):
    """Adapters (Houlsby et al., ICML 2019): after attention and FFN, before the residual sum.

    The paper also trains the layer norms. Here they stay frozen.
    """

    adapter_class = adapters.HoulsbyAdapter
    default_input = 'output'
    default_sites = (ATTENTION, FFN)


@PEFT_METHODS.register_module(name='convpass')
class ConvpassMethod(AdapterMethod):
    """Convpass (Jie and Deng, 2022): parallel to attention and FFN, reading what they read."""

    adapter_class = adapters.ConvpassAdapter
    default_input = 'normed'
    default_sites = (ATTENTION, FFN)


@PEFT_METHODS.register_module(name='lorand')
class LoRandMethod(AdapterMethod):
    """LoRand (Yin et al., CVPR 2023): after attention and FFN, before the residual sum."""

    adapter_class = adapters.LoRandAdapter
    default_input = 'output'
    default_sites = (ATTENTION, FFN)


@PEFT_METHODS.register_module(name='mona')
class MonaMethod(AdapterMethod):
    """Mona (Yin et al., CVPR 2025): after attention and FFN, after the residual sum."""

    adapter_class = adapters.MonaAdapter
    default_input = 'sum'
    default_sites = (ATTENTION, FFN)
