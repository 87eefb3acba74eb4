"""Putting a PEFT method into a model in place, and taking it out again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from .attachments import Attachment, BlockAttachment, BranchAttachment, Joint, Switch, Tap, WeightMergingAttachment
from .attachments.base import placement
from .freezing import ADAPTER, Freezing, is_adapter
from .frozen_precision import FrozenPrecision, check_frozen_dtype
from .grids import GridTracker, PatchEmbedTap
from .methods import PEFTMethod, build_method
from .pretrained import PretrainedCheck
from .recomputation import Recomputation
from .sites import FromPatchEmbed, Site, find_sites, no_site_error
from .summary import Summary

_KEY = '_peft_injection'
_MERGED = '_peft_merged'
DEFAULT_NAME = 'default'
PARTS = 'adapter_parts'  # where a model keeps necks and heads of inactive adapters


def escape(name: str) -> str:
    """An adapter's name as a part of a module's name, which has no dots."""
    return name.replace('%', '%25').replace('.', '%2E')


@dataclass
class NamedAdapter:
    """One of the adapters of a backbone: what its method put together for it.

    All adapters stay registered in the host, so that they follow ``.to()``, ``.half()`` and
    ``state_dict()`` whether they are active or not.

    Attributes:
        method: The method.
        attachments: Its attachments to modules of the host.
        parts: What stands beside the backbone for it (neck, head), by name;
            None while the model has this adapter only.
        trained: While it is inactive, which of its parameters are trained when it is active.
    """

    method: PEFTMethod
    attachments: list[Attachment]
    parts: dict[str, nn.Module] | None = None
    trained: dict[nn.Parameter, bool] | None = None

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Its modules, by the names in the backbone that they have as the only adapter."""
        for attachment in self.attachments:
            for key in attachment.adapters:
                yield attachment.path(key), attachment.part(key)

    def state(self) -> dict[str, Tensor]:
        """Its tensors, by the names in the backbone that they have as the only adapter."""
        return {f'{name}.{n}': t for name, module in self.modules() for n, t in module.state_dict().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors in, by the names of :meth:`state`.

        Raises:
            ValueError: A tensor is missing, left over or of another shape. Nothing is copied then.
        """
        own = self.state()
        wrong = own.keys() ^ state.keys() or {n for n in own if own[n].shape != state[n].shape}
        if wrong:
            raise ValueError(f'{len(wrong)} tensors are missing, left over or of another shape, such as {min(wrong)}')
        for name, value in own.items():
            value.copy_(state[name])

    def hold(self) -> None:
        """Stop training it, and remember what was trained."""
        if self.trained is None:
            own = [p for _, module in self.modules() for p in module.parameters()]
            own += [p for part in (self.parts or {}).values() for p in part.parameters()]
            self.trained = {p: p.requires_grad for p in own}
        for parameter in self.trained:
            parameter.requires_grad_(False)

    def release(self) -> None:
        """Train again what was trained before."""
        for parameter, was_trained in (self.trained or {}).items():
            parameter.requires_grad_(was_trained)
        self.trained = None


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
        self.backbone = backbone
        self.switch = Switch()
        self.joints: dict[nn.Module, Joint] = {}
        self.taps: dict[nn.Module, Tap] = {}
        self.trackers: dict[nn.Module, tuple[GridTracker, PatchEmbedTap]] = {}
        self.recomputation: Recomputation | None = None
        self.adapters: dict[str, NamedAdapter] = {}
        self.freezing: Freezing | None = None
        self.with_cp = with_cp
        self.precision = FrozenPrecision(backbone, frozen_dtype) if frozen_dtype is not None else None
        # With the matrices in another one, adapters keep the dtype that the backbone had.
        self.adapter_dtype = None if frozen_dtype is None else placement(backbone)[1]
        sites = find_sites(backbone) if method.freezes else []
        self._check(method, sites)
        self.check = PretrainedCheck(backbone, [site.name for site in sites]) if sites else None
        self._install(name, method, sites)
        self.switch.active = name
        self.freezing = Freezing(backbone) if method.freezes else None
        self.recomputation = Recomputation(backbone, sites, self.joint)
        if self.precision is not None:
            self.precision.hold()
        setattr(backbone, _KEY, self)

    @property
    def active(self) -> str | None:
        """Name of the active adapter, None while there is none."""
        return self.switch.active

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

    def _check(self, method: PEFTMethod, sites: list[Site]) -> None:
        """Refuse what cannot be carried out, before memory is taken and the host is touched."""
        attachments = plan(self.backbone, method, sites)
        if self.with_cp and (not attachments or not all(isinstance(a, BlockAttachment) for a in attachments)):
            raise ValueError(
                f"with_cp recomputes adapted blocks, and method '{method.name}' adapts none as a whole; use the "
                "backbone's own with_cp, or MMEngine's activation_checkpointing"
            )

    def _install(self, name: str, method: PEFTMethod, sites: list[Site]) -> None:
        """Make an adapter, and put it into the host."""
        attachments = method.make_attachments(self.backbone, sites, self._tracker)
        # The first one's names are those that a model with one adapter has.
        suffix = f'__{escape(name)}' if self.adapters else ''
        for attachment in attachments:
            attachment.register(suffix, self.adapter_dtype)
            attachment.joint = self.joint(attachment.module)
            attachment.joint.attachments[name] = attachment
            if self.with_cp:
                attachment.joint.with_cp = True
            for path in attachment.handlers:
                self._tap(path).users += 1
        self.adapters[name] = NamedAdapter(method, attachments)

    def joint(self, module: nn.Module) -> Joint:
        """The joint of a module, made if there is none."""
        if module not in self.joints:
            self.joints[module] = Joint(module, self.switch)
        return self.joints[module]

    def _tap(self, path: str) -> Tap:
        module = self.backbone.get_submodule(path)
        if module not in self.taps:
            self.taps[module] = Tap(module, path)
        return self.taps[module]

    def _tracker(self, site: Site) -> GridTracker | None:
        host, source = site.host, site.family.grid
        if host is None or not isinstance(source, FromPatchEmbed):
            return None
        if host not in self.trackers:
            tracker = GridTracker(host, source)
            tap = PatchEmbedTap(host.get_submodule('patch_embed'), source, tracker)
            tap.replace()
            self.trackers[host] = tracker, tap
        return self.trackers[host][0]

    def add(self, name: str, method: PEFTMethod) -> None:
        """Make another adapter, which stays inactive."""
        sites = find_sites(self.backbone)
        self._check(method, sites)
        self._install(name, method, sites)
        adapter = self.adapters[name]
        for _, module in adapter.modules():
            module.train(self.backbone.training)
        adapter.hold()

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        self.adapters = {new if name == old else name: adapter for name, adapter in self.adapters.items()}
        for attachment in self.adapters[new].attachments:
            attachment.joint.attachments[new] = attachment.joint.attachments.pop(old)
        if self.switch.active == old:
            self.switch.active = new

    def delete(self, name: str) -> None:
        """Take an adapter out; with the last one, all."""
        if self.switch.active == name:
            self.activate(None)
        if len(self.adapters) == 1:
            self.undo()
            return
        self._uninstall(name)

    def _uninstall(self, name: str) -> None:
        adapter = self.adapters.pop(name)
        for attachment in adapter.attachments:
            for path in attachment.handlers:
                tap = self.taps[self.backbone.get_submodule(path)]
                tap.users -= 1
                if not tap.users:
                    self.taps.pop(tap.module).restore()
            joint = attachment.joint
            del joint.attachments[name]
            attachment.unregister()
            if not joint.attachments and not joint.host_with_cp:
                self.joints.pop(joint.module).restore()

    def activate(self, name: str | None) -> None:
        """Make one adapter the active one, or none."""
        if name == self.switch.active:
            return
        if self.current is not None:
            self.current.hold()
        self.switch.active = name
        if self.current is not None:
            self.current.release()

    def undo(self) -> None:
        """Give the backbone back as it was."""
        for adapter in self.adapters.values():
            adapter.release()
        for name in list(self.adapters):
            self._uninstall(name)
        self.switch.active = None
        assert self.recomputation is not None
        self.recomputation.release()
        for joint in self.joints.values():
            joint.restore()
        self.joints.clear()
        if self.precision is not None:
            self.precision.release()
        for _, tap in self.trackers.values():
            tap.restore()
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


def plan(backbone: nn.Module, method: PEFTMethod, sites: list[Site]) -> list[Attachment]:
    """What a method would put into a backbone, without memory taken for it and without a trace in the host.

    Raises:
        ValueError: The method is not defined for the backbone.
    """
    if not method.adapts:
        return []
    if method.needs_blocks and not sites:
        raise no_site_error(backbone)

    def tracker_of(site: Site) -> None:
        if isinstance(site.family.grid, FromPatchEmbed) and site.host is None:
            raise ValueError(
                f'{type(backbone).__name__} has no `patch_embed` around its blocks, so the grid of its tokens is '
                f"unknown, and method '{method.name}' asks for it; use one that does not, such as adaptformer, lora or "
                'ssf, or add a BlockFamily of its own to iconformer_mm.tuning.sites.FAMILIES'
            )

    with torch.device('meta'):
        attachments = method.make_attachments(backbone, sites, tracker_of)
    if not any(p is not None for a in attachments for adapter in a.adapters.values() for p in adapter.parameters()):
        raise ValueError(f"method '{method.name}' finds nothing to adapt in {type(backbone).__name__}")
    return attachments


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
    backbone = find_backbone(model)
    return {
        attachment.path(f'{key}.{name}'): parameter.shape
        for attachment in plan(backbone, built, find_sites(backbone))
        for key, adapter in attachment.adapters.items()
        for name, parameter in adapter.named_parameters()
    }


def _refuse_dropped_tokens(model: nn.Module, method: PEFTMethod) -> None:
    """Refuse adapters that ask for the grid of tokens in masked pre-training, which drops some."""
    backbone = find_backbone(model)
    if backbone is model or not method.freezes:
        return
    sites = find_sites(backbone)
    for site in sites:
        host = site.host
        if host is not None and _drops_tokens(host) and any(_asks_for_grid(a) for a in plan(backbone, method, sites)):
            raise ValueError(
                f'{type(model).__name__} drops tokens of its {type(host).__name__} at random, so that they lie on no '
                f"grid, and method '{method.name}' filters them on one; use a method that does not, such as "
                'adaptformer, lora or ssf'
            )


def _drops_tokens(host: nn.Module) -> bool:
    """Whether a host runs its blocks on a part of the tokens when it is pre-trained (MAE, MILAN, MFF, CAE)."""
    masks = any(hasattr(type(host), name) for name in ('random_masking', 'attention_masking', 'masking_id'))
    takes_mask = 'mask' in inspect.signature(type(host).forward).parameters
    return masks or (takes_mask and not hasattr(host, 'mask_token'))


def _asks_for_grid(attachment: Attachment) -> bool:
    return isinstance(attachment, BranchAttachment) and attachment.needs_grid


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
    _refuse_dropped_tokens(model, built)
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
    if hasattr(unwrap(model), PARTS):
        delattr(unwrap(model), PARTS)


@dataclass
class _Merged:
    """What :func:`unmerge` needs: the adapter, and what merging changed."""

    name: str
    method: dict[str, Any]
    frozen_dtype: str | None
    with_cp: bool
    adapter: dict[str, Tensor]
    base: dict[str, Tensor] | None


def merge(model: nn.Module, safe: bool = True, keep_base: bool = True) -> None:
    """Fold the adapter into the base weights, for methods that make weights of them.

    The model is a stock one afterwards: its own parameters and names, outputs
    as they were with the adapter up to rounding, no cost at inference.
    Those methods are ``lora``, ``dora``, ``ssf``, ``bitfit``, ``norm`` and ``partial``.

    Args:
        model: An adapted model.
        safe: Whether to refuse an adapter that would put NaN or infinity into
            the base. Defaults to True.
        keep_base: Whether to keep a copy of the weights that change, so that
            :func:`unmerge` can give them back. Defaults to True.

    Raises:
        ValueError: The model is not adapted, has other adapters on the same
            base, its method computes what no weight of the base can, or the
            weights would not be finite. The model is unchanged then.
    """
    injection = get_injection(model)
    if injection is None:
        raise ValueError(f'{type(unwrap(model)).__name__} is not adapted: there is nothing to merge')
    if len(injection.adapters) > 1:
        raise ValueError(
            f'merging one of the adapters {", ".join(injection.adapters)} would change the base of the others; '
            'delete_adapter(model, name) those first, or merge a copy of the model'
        )
    ((name, adapter),) = injection.adapters.items()
    attachments = [a for a in adapter.attachments if isinstance(a, WeightMergingAttachment)]
    if not attachments or len(attachments) < len(adapter.attachments):
        raise ValueError(
            f"method '{adapter.method.name}' cannot be merged into the base weights; those that can: lora, dora, ssf, "
            'bitfit, norm, partial'
        )
    for attachment in attachments if safe else ():
        for weight, (_, value) in attachment.merged_weights().items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"merging would put NaN or infinity into {attachment.path(weight)}: the adapter '{name}' diverged. "
                    'Take a checkpoint from before that, or pass safe=False'
                )
    dtype = None if injection.precision is None else injection.precision.name
    record = _Merged(name, adapter.method.config, dtype, injection.with_cp, {}, {} if keep_base else None)
    record.adapter = {n: t.detach().clone() for n, t in adapter.state().items()}
    backbone = injection.backbone
    injection.undo()
    for attachment in attachments:
        for weight, (parameter, value) in attachment.merged_weights().items():
            if record.base is not None:
                record.base[attachment.path(weight)] = parameter.detach().clone()
            with torch.no_grad():
                parameter.copy_(value)
    setattr(backbone, _MERGED, record)


def unmerge(model: nn.Module) -> None:
    """Take a merged adapter out of the base weights again, which are then what they were to the last bit.

    The model is adapted as before :func:`merge`: neck and head stay as they are.

    Args:
        model: A model whose adapter was merged.

    Raises:
        ValueError: No adapter was merged into it, or ``keep_base=False`` was given.
            The model is unchanged then.
    """
    backbone = find_backbone(model)
    record: _Merged | None = getattr(backbone, _MERGED, None)
    if record is None:
        raise ValueError(f'no adapter was merged into {type(unwrap(model)).__name__}: there is nothing to unmerge')
    if record.base is None:
        raise ValueError(
            'the adapter was merged with keep_base=False, so its base is gone; load the base weights again'
        )
    if get_injection(model) is not None:
        raise ValueError('the model is adapted anew; call remove(model) first')
    parameters = dict(backbone.named_parameters())
    with torch.no_grad():
        for name, value in record.base.items():
            parameters[name].copy_(value)
    dtype = None if record.frozen_dtype is None else check_frozen_dtype(record.frozen_dtype)
    method = build_method(record.method)
    injection = Injection(backbone, method, record.name, frozen_dtype=dtype, with_cp=record.with_cp)
    injection.adapters[record.name].load(record.adapter)
    delattr(backbone, _MERGED)


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

    inactive = {
        id(p)
        for adapter in (injection.adapters.values() if injection else ())
        if adapter.trained
        for p in adapter.trained
    }

    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in inactive:
            part = 'inactive adapters'
        elif id(parameter) in own:
            part = 'backbone'
        elif is_adapter(name):
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
