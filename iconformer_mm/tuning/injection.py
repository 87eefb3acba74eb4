"""Putting a PEFT method into a model in place, and taking it out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import nn

from iconformer_mm.compat import dtype_of

from .attachment import Attachment, BlockAttachment, GridTracker
from .freezing import ADAPTER, Freezing, is_adapter
from .frozen_precision import FrozenPrecision, check_frozen_dtype
from .methods import PEFTMethod, build_method
from .pretrained import PretrainedCheck
from .quantised import check_gradients_pass
from .sites import FromPatchEmbed, Site, find_sites, no_site_error
from .summary import Summary
from .weight_attachment import WeightAttachment

_KEY = '_peft_injection'
DEFAULT_NAME = 'default'


@dataclass
class NamedAdapter:
    """One of the adapters of a backbone: what its method put together for it.

    Attributes:
        method: The method.
        attachments: Its joints with the blocks.
        parts: What stands beside the backbone for it (neck, head), by name;
            None while the model has this adapter only.
    """

    method: PEFTMethod
    attachments: list[Attachment]
    parts: dict[str, nn.Module] | None = None


class Injection:
    """All that was done to one backbone; kept on it, so that it can be undone.

    Args:
        backbone: The backbone to adapt.
        method: The method of the first adapter.
        name: The name of the first adapter.
        frozen_dtype: What frozen matrices are held in; None for what they are in.
        with_cp: Whether blocks are recomputed in the backward pass.

    Raises:
        ValueError: No block is known, the host uses the adapters' name, or there are no
            adapted blocks to recompute.
    """

    def __init__(
        self,
        backbone: nn.Module,
        method: PEFTMethod,
        name: str = DEFAULT_NAME,
        frozen_dtype: torch.dtype | None = None,
        with_cp: bool = False,
    ) -> None:
        # All that can fail comes first: a refused model is an untouched model.
        taken = [n for n, _ in backbone.named_parameters() if is_adapter(n)]
        if taken:
            raise ValueError(
                f"parameters of {type(backbone).__name__} have '{ADAPTER}' in their names ('{taken[0]}'), which "
                'marks the parameters that iconformer_mm adds; rename them'
            )
        if method.adapts or not method.freezes:
            check_gradients_pass(backbone, method.name)
        self.backbone = backbone
        self.trackers: dict[nn.Module, GridTracker] = {}
        self.adapters: dict[str, NamedAdapter] = {}
        self.active: str | None = None
        self.freezing: Freezing | None = None
        self.with_cp = with_cp
        self.precision = FrozenPrecision(backbone, frozen_dtype) if frozen_dtype is not None else None
        # With the matrices in another one, adapters keep the dtype that the backbone had.
        self.adapter_dtype = None if frozen_dtype is None else dtype_of(backbone)
        sites = find_sites(backbone) if method.freezes else []
        first = self._make(method, sites)
        self.check = PretrainedCheck(backbone, [site.name for site in sites]) if sites else None
        self.adapters[name] = first
        self.activate(name)
        self.freezing = Freezing(backbone) if method.freezes else None
        if self.precision is not None:
            self.precision.hold()
        setattr(backbone, _KEY, self)

    @property
    def current(self) -> NamedAdapter | None:
        """The active adapter, None while there is none."""
        return None if self.active is None else self.adapters[self.active]

    @property
    def method(self) -> PEFTMethod:
        """The method of the active adapter; while none is active, of the first."""
        return (self.current or next(iter(self.adapters.values()))).method

    @property
    def attachments(self) -> list[Attachment]:
        """The attachments of the active adapter."""
        return self.current.attachments if self.current else []

    def _make(self, method: PEFTMethod, sites: list[Site]) -> NamedAdapter:
        # First without memory, and without trackers, so that nothing is left of what fails.
        adapter_shapes(self.backbone, method)
        attachments = method.make_attachments(self.backbone, sites, self._tracker)
        if self.with_cp:
            if not attachments or not all(isinstance(a, BlockAttachment) for a in attachments):
                raise ValueError(
                    f"with_cp recomputes adapted blocks, and method '{method.name}' adapts none as a whole; use the "
                    "backbone's own with_cp, or MMEngine's activation_checkpointing"
                )
            for attachment in attachments:
                attachment.with_cp = True
        return NamedAdapter(method, attachments)

    def _tracker(self, site: Site) -> GridTracker | None:
        host, source = site.host, site.family.grid
        if host is None or not isinstance(source, FromPatchEmbed):
            return None
        if host not in self.trackers:
            self.trackers[host] = GridTracker(host, source)
        return self.trackers[host]

    def add(self, name: str, method: PEFTMethod) -> None:
        """Make another adapter, which stays inactive."""
        with self.inactive():
            made = self._make(method, find_sites(self.backbone))
        self.adapters[name] = made

    @contextmanager
    def inactive(self) -> Iterator[None]:
        """Within it no adapter is active."""
        name = self.active
        self.activate(None)
        try:
            yield
        finally:
            if name in self.adapters:
                self.activate(name)

    def activate(self, name: str | None) -> None:
        """Make one adapter the active one, or none."""
        if name == self.active:
            return
        for attachment in self.attachments:
            attachment.detach()
        self.active = name
        for attachment in self.attachments:
            attachment.attach(self.adapter_dtype)
        if self.freezing is not None:
            self.freezing.train(self.backbone.training)

    def undo(self) -> None:
        """Give the backbone back as it was."""
        self.activate(None)
        if self.precision is not None:
            self.precision.release()
        for tracker in self.trackers.values():
            tracker.detach()
        if self.check is not None:
            self.check.release()
        if self.freezing is not None:
            self.freezing.release()
        delattr(self.backbone, _KEY)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of (distributed or test-time-augmentation) wrappers."""
    inner: Any = model
    while is_model_wrapper(inner) or isinstance(inner, BaseTTAModel):
        inner = inner.module
    return inner


def find_backbone(model: nn.Module) -> nn.Module:
    """``model.backbone``, or the model itself where there is none."""
    model = unwrap(model)
    backbone = getattr(model, 'backbone', None)
    return backbone if isinstance(backbone, nn.Module) else model


def get_injection(model: nn.Module) -> Injection | None:
    """What was injected into a model, None for an unadapted one."""
    return getattr(find_backbone(model), _KEY, None)


def adapter_shapes(model: nn.Module, method: str | dict | PEFTMethod) -> dict[str, torch.Size]:
    """Shapes of the adapter parameters a method would add, without memory taken for them.

    Args:
        model: A model, or a backbone alone.
        method: The method, its name or its config.

    Returns:
        Shapes by the names in the backbone.

    Raises:
        ValueError: The method or an option is unknown or out of range, or the
            method is not defined for the model.
    """
    built = method if isinstance(method, PEFTMethod) else build_method(method)
    if not built.adapts:
        return {}
    backbone = find_backbone(model)
    sites = find_sites(backbone)
    if built.needs_blocks and not sites:
        raise no_site_error(backbone)
    injection = get_injection(model)
    with torch.device('meta'), injection.inactive() if injection else nullcontext():
        attachments = built.make_attachments(backbone, sites, lambda site: None)
    shapes = {
        f'{attachment.name}.{place}.{name}'.removeprefix('.'): parameter.shape
        for attachment in attachments
        for place, adapter in attachment.adapters.items()
        for name, parameter in adapter.named_parameters()
    }
    if not shapes:
        raise ValueError(f"method '{built.name}' finds nothing to adapt in {type(backbone).__name__}")
    return shapes


def inject(
    model: nn.Module,
    method: str | dict = 'icon',
    frozen_dtype: str | None = None,
    with_cp: bool = False,
    **options: Any,
) -> Summary:
    """Put a PEFT method into a model, in place.

    The model stays the same object, its parameter names stay what they were,
    and until the first training step so do its outputs, to the last bit (but
    for methods whose papers start otherwise: ssf, vpt, mona). The backbone
    (``model.backbone``, or the model itself) is frozen but for its adapters;
    neck and head stay as they are.

    Args:
        model: A model, or a backbone alone.
        method: Name or config (``dict(type='icon', bottleneck=32)``) of the
            method: ``icon``, ``icon-static``, ``adaptformer``, ``adapter``, ``convpass``,
            ``lorand``, ``mona``, ``lora``, ``dora``, ``ssf``, ``vpt``, ``bitfit``, ``norm``,
            ``partial``, ``frozen``, ``full``.
        frozen_dtype: ``'bfloat16'`` holds the frozen matrices of the backbone in half the
            memory, and runs the backbone under autocast; outputs are rounded by that, and
            :func:`remove` gives the rounded weights back. Defaults to None, as they are.
        with_cp: Whether adapted blocks are recomputed in the backward pass (gradient
            checkpointing), also where the backbone has no such option. Defaults to False,
            which leaves it to the backbone.
        **options: Options of the method, such as ``bottleneck=32``.

    Returns:
        What is trained now. Print it for a table.

    Raises:
        ValueError: The method or an option is unknown or out of range, the
            model is adapted already or wrapped, or has no known block. The
            model is unchanged then.

    Example:
        >>> from iconformer_mm import inject
        >>> from mmpretrain import get_model
        >>> model = get_model('swin-base_16xb64_in1k')
        >>> print(inject(model, 'icon'))
    """
    if is_model_wrapper(model):
        raise ValueError(
            f'{type(model).__name__} wraps the model and would not see parameters added now; inject into the bare '
            'model, then wrap it'
        )
    built = build_method(method, **options)
    current = get_injection(model)
    if current is not None:
        raise ValueError(f"the model is adapted already, by '{current.method.name}'; call remove(model) first")
    dtype = None if frozen_dtype is None else check_frozen_dtype(frozen_dtype)
    if dtype is not None and not built.freezes:
        raise ValueError(f"method '{built.name}' freezes nothing that could be held in frozen_dtype={frozen_dtype!r}")
    Injection(find_backbone(model), built, frozen_dtype=dtype, with_cp=with_cp)
    return summarize(model)


def remove(model: nn.Module) -> None:
    """Take the PEFT method out again: same keys, same outputs, same gradients as before.

    Args:
        model: An adapted model.

    Raises:
        ValueError: The model is not adapted.
    """
    injection = get_injection(model)
    if injection is None:
        raise ValueError(f'{type(unwrap(model)).__name__} is not adapted: there is nothing to remove')
    injection.undo()


def merge(model: nn.Module) -> None:
    """Fold the adapter into the base weights, for methods that make weights of them.

    The model is a stock one afterwards: its own parameters and names, outputs
    as they were with the adapter (but for rounding), no cost at inference.
    Those methods are ``lora``, ``dora``, ``ssf``, ``bitfit``, ``norm`` and ``partial``.

    Args:
        model: An adapted model. Its base is changed for good.

    Raises:
        ValueError: The model is not adapted, has other adapters on the same
            base, or its method computes what no weight of the base can. The
            model is unchanged then.
    """
    injection = get_injection(model)
    if injection is None:
        raise ValueError(f'{type(unwrap(model)).__name__} is not adapted: there is nothing to merge')
    if len(injection.adapters) > 1:
        raise ValueError(
            f'merging one of the adapters {", ".join(injection.adapters)} would change the base of the others; '
            'delete_adapter(model, name) those first, or merge a copy of the model'
        )
    (adapter,) = injection.adapters.values()
    attachments = [a for a in adapter.attachments if isinstance(a, WeightAttachment)]
    if not attachments or len(attachments) < len(adapter.attachments):
        raise ValueError(
            f"method '{adapter.method.name}' cannot be merged into the base weights; those that can: lora, dora, ssf, "
            'bitfit, norm, partial'
        )
    injection.undo()
    for attachment in attachments:
        attachment.merge()


def summarize(model: nn.Module) -> Summary:
    """Count what a model trains, adapted or not.

    Args:
        model: Any model.

    Returns:
        The counts. Print it for a table.
    """
    model = unwrap(model)
    backbone = find_backbone(model)
    injection = get_injection(model)
    own = {id(p) for n, p in backbone.named_parameters() if not is_adapter(n)}
    added = {id(p) for p in backbone.parameters()} - own  # a head may have 'adapter' in its names, too

    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            part = 'backbone'
        elif id(parameter) in added:
            part = 'adapters'
        else:
            part = name.partition('.')[0]
        trained, total = parts.get(part, (0, 0))
        parts[part] = (trained + parameter.numel() * parameter.requires_grad, total + parameter.numel())

    trainable = sum(trained for trained, _ in parts.values())
    own_trained, own_total = parts.get('backbone', (0, 0))
    adapters_trained, adapters = parts.get('adapters', (0, 0))
    sites: dict[str, list[str]] = {}
    for attachment in injection.attachments if injection else ():
        sites.setdefault(attachment.kind, []).append(attachment.name)
    return Summary(
        method=injection.current.method.name if injection and injection.current else None,
        trainable=trainable,
        frozen=sum(total for _, total in parts.values()) - trainable,
        adapters=adapters,
        backbone=own_total,
        backbone_share=(own_trained + adapters_trained) / max(own_total, 1),
        sites=sites,
        parts=parts,
    )
