"""Putting a PEFT method into a model in place, and taking it out again."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from torch import Tensor, nn

from iconformer_mm.compat import dtype_of, read_maps_in_order

from .accounting import BaseAccount
from .attachments import Attachment, BlockAttachment, BranchAttachment, Joint, Switch, Tap, WeightMergingAttachment
from .backbones import (
    averaged_models,
    borrowed_modules,
    check_host,
    find_backbones,
    find_classifiers,
    find_copies,
    is_below,
    join,
    near,
    search,
    unwrap,
)
from .families import BlockFamily, FromPatchEmbed, NoGrid, class_path, family_of, register_families
from .freezing import ADAPTER, Freezing, FrozenParts, is_adapter
from .frozen_precision import FrozenPrecision, check_frozen_dtype, tell_rounded
from .grids import GridTracker, PatchEmbedTap
from .initialisation import KeptInitialisation
from .methods import PEFTMethod, Towers, build_method
from .packing import KINDS
from .quantised import check_gradients_pass
from .quantised_weight import named_weights
from .recomputation import LayerRecomputation, Recomputation, layer_of
from .replacement import Replacement
from .selection import Selection
from .shared_state import SharedState, make_shareable
from .sites import Site, find_sites, no_site_error
from .summary import Summary, TowerSummary
from .trained_base import TrainedBase, set_values
from .unread import unread_patches
from .where import build_towers, find_towers
from .without_gradient import check_reached

_KEY = '_peft_injection'
_MERGED = '_peft_merged'
DEFAULT_NAME = 'default'
PARTS = 'adapter_parts'  # where a model keeps necks and heads of inactive adapters


def escape(name: str) -> str:
    """An adapter's name as a part of a module's name, which has no dots."""
    return name.replace('%', '%25').replace('.', '%2E')


@dataclass
class NamedAdapter:
    """One of the adapters of a model: what its method put together for it.

    All adapters stay registered in the host, so that they follow ``.to()``, ``.half()`` and
    ``state_dict()`` whether they are active or not.

    Attributes:
        method: The method.
        attachments: Its attachments to modules of the host.
        parts: What stands beside the backbones for it (neck, head), by name;
            None while the model has this adapter only.
        selection: What it adapts and trains beside the method's own choice.
        paths: Of each attachment, the path of its backbone.
        trained: While it is inactive, which of its parameters are trained when it is active.
    """

    method: PEFTMethod
    attachments: list[Attachment]
    parts: dict[str, nn.Module] | None = None
    selection: Selection = field(default_factory=Selection)
    paths: list[str] = field(default_factory=list)
    trained: dict[nn.Parameter, bool] | None = None

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Its modules, by the names that they have as the only adapter: in the backbone; of several, with its path."""
        several = len(set(self.paths)) > 1
        for path, attachment in zip(self.paths, self.attachments):
            for key in attachment.adapters:
                yield join(path if several else '', attachment.path(key)), attachment.part(key)

    def state(self) -> dict[str, Tensor]:
        """Its tensors, by the names of :meth:`modules`."""
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
    """All that was done to the backbones of a model; kept on each, so that it can be undone.

    Args:
        backbones: The backbones to adapt, by their path in the model, or one alone.
        method: The method of the first adapter.
        name: The name of the first adapter.
        frozen_dtype: Name of the precision that frozen matrices are held in; None for their own.
        with_cp: Whether blocks are recomputed in the backward pass.
        selection: What is adapted and trained beside the method's own choice.
        follows: Whether the backbones follow others by averaging, and learn nothing themselves.

    Attributes:
        outside: Of each backbone, names of what lies in it and is not its own: classifiers, which are heads, and
            modules of other parts.
        trained: Of each backbone whose own parameters are trained in part, those.

    Raises:
        ValueError: No block is known, the host uses the adapters' name, what was selected is not there, or there
            are no adapted blocks to recompute.
    """

    def __init__(
        self,
        backbones: dict[str, nn.Module] | nn.Module,
        method: PEFTMethod,
        name: str = DEFAULT_NAME,
        frozen_dtype: str | None = None,
        with_cp: bool = False,
        selection: Selection = Selection(),  # noqa: B008 - it cannot be changed
        follows: bool = False,
    ) -> None:
        # All that can fail comes first: a refused model is an untouched model.
        self.backbones = {'': backbones} if isinstance(backbones, nn.Module) else dict(backbones)
        for backbone in self.backbones.values():
            taken = [n for n, _ in backbone.named_parameters() if is_adapter(n)]
            if taken:
                raise ValueError(
                    f"parameters of {type(backbone).__name__} have '{ADAPTER}' in their names ('{taken[0]}'), which "
                    'marks the parameters that iconformer_mm adds; rename them'
                )
        self.follows = follows
        self.switch = Switch()
        self.joints: dict[nn.Module, Joint] = {}
        self.taps: dict[nn.Module, Tap] = {}
        self.trackers: dict[nn.Module, tuple[GridTracker, PatchEmbedTap]] = {}
        self.routers: dict[nn.Module, Replacement] = {}  # see mixed()
        self.recomputations: list[Recomputation] = []
        self.layers: dict[nn.Module, LayerRecomputation] = {}  # of towers, with with_cp
        self.initialisation: KeptInitialisation | None = None
        self.shared: list[SharedState] = []
        self.adapters: dict[str, NamedAdapter] = {}
        self.with_cp = with_cp
        items = list(self.backbones.items())
        self.outside = {
            path: [*find_classifiers(b), *borrowed_modules(b)] if selection.classifiers and method.freezes else []
            for path, b in items
        }
        trained = {path: selection.trained_names(b, self.outside[path]) for path, b in items}
        selection.check_unfreeze(
            n
            for path, b in items
            for n, _ in b.named_parameters()
            if not is_adapter(n) and not is_below(n, self.outside[path])
        )
        if not method.freezes and selection.unfreeze:
            raise ValueError(f"method '{method.name}' trains the whole backbone: there is nothing to unfreeze")
        self._check(method, selection)
        if frozen_dtype in KINDS and len(items) > 1:
            raise ValueError(
                f'frozen_dtype={frozen_dtype!r} holds one backbone, and {", ".join(map(repr, self.backbones))} are '
                "adapted together; use frozen_dtype='bfloat16'"
            )
        self.precisions = [
            FrozenPrecision(b, frozen_dtype, trained[path], self.outside[path])
            for path, b in items
            if frozen_dtype is not None
        ]
        # With the matrices in another one, adapters keep the dtype that the backbone had.
        self.adapter_dtype = None if frozen_dtype is None else dtype_of(items[0][1])
        self.accounts = {
            path: BaseAccount(b, self, [site.name for site in find_sites(b)])
            for path, b in items
            if method.freezes and not follows
        }
        self.freezings: list[Freezing] = []
        # What follows learns nothing itself, whatever its host has set so far.
        self._learnt = [p for b in self.backbones.values() for p in b.parameters() if follows and p.requires_grad]
        self._install(name, method, selection)
        self.switch.active = name
        if follows:
            for backbone in self.backbones.values():
                backbone.requires_grad_(False)
        if method.freezes and not follows:
            self.freezings = [Freezing(b, trained[path], self.outside[path]) for path, b in items]
        self.trained = {path: TrainedBase(b, trained[path]) for path, b in items if trained[path] and not follows}
        for backbone in self.backbones.values() if method.freezes else ():
            self.recomputations.append(Recomputation(backbone, find_sites(backbone), self.joint))
        for backbone in self.backbones.values():
            setattr(backbone, _KEY, self)

    @property
    def backbone(self) -> nn.Module:
        """The only backbone.

        Raises:
            ValueError: There are several.
        """
        if len(self.backbones) > 1:
            raise ValueError(f'there are several adapted backbones, {", ".join(map(repr, self.backbones))}')
        return next(iter(self.backbones.values()))

    @property
    def active(self) -> str | None:
        """Name of the active adapter, None while there is none."""
        return self.switch.active

    @property
    def current(self) -> NamedAdapter | None:
        """The active adapter, None while there is none."""
        return None if self.active is None else self.adapters[self.active]

    @property
    def frozen_dtype(self) -> str | None:
        """Name of the precision that frozen matrices are held in, None for their own."""
        return self.precisions[0].name if self.precisions else None

    @property
    def method(self) -> PEFTMethod:
        """The method of the active adapter; while none is active, of the first."""
        return (self.current or next(iter(self.adapters.values()))).method

    @property
    def selection(self) -> Selection:
        """What the active adapter adapts and trains beside its method's own choice; while none is, the first."""
        return (self.current or next(iter(self.adapters.values()))).selection

    @property
    def attachments(self) -> list[Attachment]:
        """The attachments of the active adapter."""
        return self.current.attachments if self.current else []

    def learning_modules(self) -> dict[str, list[nn.Module]]:
        """Modules with adapters that are trained, by the path of their backbone."""
        found: dict[str, list[nn.Module]] = {}
        for path, attachment in zip(self.current.paths if self.current else (), self.attachments):
            if any(p.requires_grad for key in attachment.adapters for p in attachment.part(key).parameters()):
                found.setdefault(path, []).append(attachment.module)
        return found

    def named_attachments(self, adapter: str | None = None) -> dict[str, Attachment]:
        """The attachments of an adapter, by their names in the backbone; of several, with its path.

        Args:
            adapter: The adapter. Defaults to None: the active one.
        """
        named = self.adapters.get(adapter or self.active or '')
        if named is None:
            return {}
        pairs = zip(named.paths, named.attachments)
        return {self.full_name(path, attachment.name): attachment for path, attachment in pairs}

    def full_name(self, path: str, name: str) -> str:
        """A name in one of the backbones, as files have it: with the path only where there are several."""
        return join(path, name) if len(self.backbones) > 1 else name

    def path_of(self, backbone: nn.Module) -> str:
        """The path that one of the backbones is known by."""
        return next(path for path, module in self.backbones.items() if module is backbone)

    def trained_of(self, backbone: nn.Module) -> list[str]:
        """Names in one of the backbones of its own parameters and statistics that are trained in place.

        They are those that the user named (``unfreeze``), and output norms that the weights lack.
        """
        path = self.path_of(backbone)
        named = self.trained[path].names if path in self.trained else []
        return [*named, *sorted(self.accounts[path].norms if path in self.accounts else ())]

    def trained_names(self) -> list[str]:
        """Names of the backbones' own parameters and statistics that are trained in place."""
        return [self.full_name(path, name) for path, b in self.backbones.items() for name in self.trained_of(b)]

    def trained_norms(self) -> list[str]:
        """Names of the output norms that are trained since the weights lack them."""
        return [self.full_name(path, name) for path, a in self.accounts.items() for name in sorted(a.norms)]

    def adapter_names(self) -> list[str]:
        """Names in the model of the active adapter's tensors."""
        if self.current is None:
            return []
        return [
            join(path, f'{attachment.path(key + attachment.suffix)}.{name}')
            for path, attachment in zip(self.current.paths, self.current.attachments)
            for key in attachment.adapters
            for name in attachment.part(key).state_dict()
        ]

    def trains(self, name: str) -> bool:
        """Whether a parameter or buffer of a backbone is trained, an adapter's or the backbone's own.

        Args:
            name: Its name in the backbone; of several, with the backbone's path.
        """
        return is_adapter(name) or name in self.trained_names()

    def _check(self, method: PEFTMethod, selection: Selection) -> None:
        """Refuse what cannot be carried out, before memory is taken and the host is touched."""
        if isinstance(method, Towers):
            unknown = [path for path in method.methods if path not in self.backbones]
            if unknown:
                raise ValueError(
                    f'methods: {unknown[0]!r} is not among the towers that are adapted: '
                    f'{", ".join(map(repr, self.backbones))}. All adapters of a model share its towers'
                )
        recomputed = False
        for path, backbone in self.backbones.items():
            try:
                planned = plan(backbone, method.of(path), selection, self.outside[path])
                if self.with_cp and planned:
                    _check_recomputable(backbone, method.of(path), planned)
                    recomputed = True
            except ValueError as error:
                if len(self.backbones) == 1:
                    raise
                raise ValueError(f'{path!r}: {error}') from error
        if self.with_cp and not recomputed:
            raise ValueError(f"with_cp recomputes adapted blocks, and method '{method.name}' adapts none")

    def _install(self, name: str, method: PEFTMethod, selection: Selection) -> None:
        """Make an adapter, and put it into the host."""
        adapter = NamedAdapter(method, [], selection=selection)
        # The first one's names are those that a model with one adapter has.
        suffix = f'__{escape(name)}' if self.adapters else ''
        for path, backbone in self.backbones.items():
            # What only unread tokens pass would get no gradient, and weight decay would change it all the same.
            unread = unread_patches(find_sites(backbone))
            made = make_attachments(backbone, method.of(path), selection, self.outside[path], self._tracker)
            for attachment in made:
                attachment.register(suffix, self.adapter_dtype)
                attachment.joint = self.joint(attachment.module)
                attachment.joint.attachments[name] = attachment
                if self.with_cp:
                    self._recompute(backbone, attachment)
                for tapped in attachment.handlers:
                    self._tap(backbone, tapped).users += 1
                for key, own in attachment.adapters.items():
                    attachment.part(key).train(backbone.training)
                    for part in getattr(own, 'patch_only', ()) if attachment.name in unread else ():
                        own.get_submodule(part).requires_grad_(False)
                adapter.attachments.append(attachment)
                adapter.paths.append(path)
        self.adapters[name] = adapter

    def joint(self, module: nn.Module) -> Joint:
        """The joint of a module, made if there is none."""
        if module not in self.joints:
            self.joints[module] = Joint(module, self.switch)
        return self.joints[module]

    def _recompute(self, backbone: nn.Module, attachment: Attachment) -> None:
        """Recompute an adapted block, or the layer of a tower that holds an adapted module."""
        layer = None if isinstance(attachment, BlockAttachment) else layer_of(backbone, attachment.name)
        if layer in (None, attachment.name):
            attachment.joint.with_cp = isinstance(attachment, BlockAttachment) or layer is not None
            return
        module = backbone.get_submodule(layer)
        if module not in self.layers:
            self.layers[module] = LayerRecomputation(module, self.switch)

    def _tap(self, backbone: nn.Module, name: str) -> Tap:
        module = backbone.get_submodule(name)
        if module not in self.taps:
            self.taps[module] = Tap(module, name)
        return self.taps[module]

    def _tracker(self, site: Site) -> GridTracker | None:
        module, source = site.patch_embed, site.grid
        if site.host is None or module is None or not isinstance(source, FromPatchEmbed):
            return None
        if module not in self.trackers:
            tracker = GridTracker(site.host, source)
            tap = PatchEmbedTap(module, source, tracker)
            tap.replace()
            self.trackers[module] = tracker, tap
        return self.trackers[module][0]

    def check_unchanged(self, what: str) -> None:
        """Refuse what needs the base as it was, while some of it is trained in place.

        Args:
            what: What needs it, for the error.

        Raises:
            ValueError: Parameters of the base are trained.
        """
        if self.trained:
            name = next(iter(self.trained.values())).names[0]
            raise ValueError(f'{what} needs the base as it was, but {name} of it is trained in place (unfreeze)')
        if self.trained_norms():
            raise ValueError(
                f'{what} needs the base as it was, but {self.trained_norms()[0]} of it is trained in place, since the '
                'pre-trained weights lack it'
            )

    def add(self, name: str, method: PEFTMethod, selection: Selection = Selection()) -> None:  # noqa: B008
        """Make another adapter, which stays inactive.

        Raises:
            ValueError: The base is trained in place, or would be; or no gradient passes it.
        """
        self.check_unchanged('another adapter')
        if selection.unfreeze:
            raise ValueError('unfreeze changes the base itself, so an adapter with it cannot share it with others')
        check_trainable(self.backbones, method, selection)
        self._check(method, selection)
        self._install(name, method, selection)
        self.adapters[name].hold()

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name."""
        self.adapters = {new if name == old else name: adapter for name, adapter in self.adapters.items()}
        for attachment in self.adapters[new].attachments:
            attachment.joint.attachments[new] = attachment.joint.attachments.pop(old)
        if self.switch.active == old:
            self.switch.active = new

    def delete(self, name: str) -> None:
        """Take out one of several adapters."""
        if self.switch.active == name:
            self.activate(None)
        self._uninstall(name)

    def _uninstall(self, name: str) -> None:
        adapter = self.adapters.pop(name)
        for part in (adapter.parts or {}).values():
            if part in self.routers:
                self.routers.pop(part).restore()
        for path, attachment in zip(adapter.paths, adapter.attachments):
            for tapped in attachment.handlers:
                tap = self.taps[self.backbones[path].get_submodule(tapped)]
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

    def undo(self, restore: bool = True) -> None:
        """Give the backbones back as they were.

        Args:
            restore: Whether parameters that were trained in place get their base values back. Defaults to True.

        Raises:
            ValueError: The base values are not known.
        """
        for base in self.trained.values() if restore else ():
            base.check()
        for adapter in self.adapters.values():
            adapter.release()
        for name in list(self.adapters):
            self._uninstall(name)
        self.switch.active = None
        for router in self.routers.values():
            router.restore()
        self.routers.clear()
        for recomputation in self.recomputations:
            recomputation.release()
        for layer in self.layers.values():
            layer.restore()
        self.layers.clear()
        for joint in self.joints.values():
            joint.restore()
        self.joints.clear()
        for precision in self.precisions:
            precision.release()
        for base in self.trained.values():
            if restore:
                base.restore()
            base.release()
        for _, tap in self.trackers.values():
            tap.restore()
        for account in self.accounts.values():
            account.release(restore)
        for freezing in self.freezings:
            freezing.release()
        for parameter in self._learnt:
            parameter.requires_grad_(True)
        if self.initialisation is not None:
            self.initialisation.release()
        for state in self.shared:
            state.release()
        for backbone in self.backbones.values():
            delattr(backbone, _KEY)


def _check_recomputable(tower: nn.Module, method: PEFTMethod, planned: Sequence[Attachment]) -> None:
    """Refuse to recompute a tower that is adapted neither block by block nor in layers.

    Raises:
        ValueError: It is not.
    """
    if all(isinstance(attachment, BlockAttachment) for attachment in planned):
        return
    if find_sites(tower):
        raise ValueError(
            f"with_cp recomputes adapted blocks, and method '{method.name}' adapts none as a whole; use the "
            "backbone's own with_cp, or MMEngine's activation_checkpointing"
        )
    if all(layer_of(tower, attachment.name) is None for attachment in planned):
        raise ValueError(
            f'with_cp recomputes the layers of a tower, and {type(tower).__name__} has no list of layers; leave it out'
        )


def make_attachments(
    backbone: nn.Module,
    method: PEFTMethod,
    selection: Selection,
    outside: Sequence[str],
    tracker_of: Callable[[Site], GridTracker | None],
) -> list[Attachment]:
    """What a method puts together for a backbone.

    Args:
        backbone: The backbone.
        method: The method.
        selection: Which of its blocks are adapted. Not all: nothing outside of blocks is.
        outside: Names of classifiers in it, which get no adapters.
        tracker_of: Gives the tracker of a block's host.

    Raises:
        ValueError: The method is not defined for the backbone, or finds nothing to adapt.
    """
    if not method.adapts:
        if selection.blocks != 'all':
            raise ValueError(f"method '{method.name}' adapts no blocks, so there are none to choose by `blocks`")
        return []
    sites = find_sites(backbone)
    if method.needs_blocks and not sites:
        if selection.backbones is None:
            raise no_site_error(backbone)
        if selection.blocks != 'all':
            selection.chosen(sites, type(backbone).__name__)
        return [a for a in method.make_tower_attachments(backbone) if not is_below(a.name, outside)]
    chosen = selection.chosen(sites, type(backbone).__name__)
    names = [site.name for site in sites]
    places = [names.index(site.name) for site in chosen]
    if places and getattr(method, 'deep', True) is False and places != list(range(places[0], places[-1] + 1)):
        raise ValueError(
            f"method '{method.name}' with deep=False carries tokens from block to block, so `blocks` must be "
            f'consecutive; got {[site.name for site in chosen]}'
        )
    attachments = method.make_attachments(backbone, chosen, tracker_of)
    if selection.blocks != 'all':
        attachments = [a for a in attachments if is_below(a.name, [site.name for site in chosen])]
    attachments = [a for a in attachments if not is_below(a.name, outside)]
    if not any(True for a in attachments for adapter in a.adapters.values() for _ in adapter.parameters()):
        raise ValueError(f"method '{method.name}' finds nothing to adapt in {type(backbone).__name__}")
    return attachments


def plan(backbone: nn.Module, method: PEFTMethod, selection: Selection, outside: Sequence[str]) -> list[Attachment]:
    """What a method would put into a backbone, without memory taken for it and without a trace in the host.

    Raises:
        ValueError: The method is not defined for the backbone.
    """

    def tracker_of(site: Site) -> None:
        if isinstance(site.grid, FromPatchEmbed) and site.host is None:
            raise ValueError(
                f'{type(backbone).__name__} has no `patch_embed` around its blocks, so the grid of its tokens is '
                f"unknown, and method '{method.name}' asks for it; use one that does not, such as adaptformer, lora or "
                'ssf, or register_family(...) with a grid of its own'
            )
        if isinstance(site.grid, FromPatchEmbed) and site.host is not None:
            try:
                GridTracker(site.host, site.grid)
            except AttributeError as error:
                raise ValueError(
                    f'{type(site.host).__name__} does not say how many tokens come before the patches ({error}), and '
                    f"method '{method.name}' asks for it; use one that does not, such as adaptformer, lora or ssf"
                ) from error
        if isinstance(site.grid, NoGrid):
            raise ValueError(
                f'{site.family.name} blocks have no grid for the adapters of {method.name!r}: {site.grid.reason}. '
                'Use a method that asks for none, such as adaptformer, lora or ssf'
            )

    with torch.device('meta'):
        return make_attachments(backbone, method, selection, outside, tracker_of)


def injections_of(model: nn.Module) -> list[Injection]:
    """All that was injected below a model, followers included."""
    found = [vars(module)[_KEY] for module in unwrap(model).modules() if _KEY in vars(module)]
    return list({id(injection): injection for injection in found}.values())


def get_injection(model: nn.Module) -> Injection | None:
    """What was injected into a model, None for an unadapted one.

    Raises:
        ValueError: Parts of the model were adapted apart from each other, or only a part of what was adapted
            together is given.
    """
    model = unwrap(model)
    found = injections_of(model)
    if len(found) > 1:
        averaged = [id(m) for root in search(model).followers.values() for m in root.modules()]
        found = [i for i in found if not i.follows and not all(id(b) in averaged for b in i.backbones.values())]
    if len(found) > 1:
        raise ValueError(
            f'{type(model).__name__} has {len(found)} backbones that were adapted apart from each other: adapt them '
            'together, by inject(model, backbones=[...])'
        )
    if not found:
        return None
    return found[0]


def backbones_of(model: nn.Module) -> dict[str, nn.Module]:
    """The backbones of a model by their paths in it: the adapted ones, or those there are by structure.

    Raises:
        ValueError: Several were adapted together, and not all of them lie in the model.
    """
    model = unwrap(model)
    injection = get_injection(model)
    if injection is None:
        return search(model).learning or {'': model}
    own = {id(b) for b in injection.backbones.values()}
    found = {name: module for name, module in model.named_modules() if id(module) in own}
    if len(found) < len(own):
        raise ValueError(
            f'{", ".join(map(repr, injection.backbones))} were adapted together: give the whole model, not one of them'
        )
    return found


def find_backbone(model: nn.Module) -> nn.Module:
    """The only backbone of a model, or the model itself where it is one.

    Raises:
        ValueError: There are several.
    """
    found = backbones_of(model)
    if len(found) > 1:
        raise ValueError(
            f'{type(unwrap(model)).__name__} has several backbones, {", ".join(map(repr, found))}, where one is needed'
        )
    return next(iter(found.values()))


def adapter_shapes(
    model: nn.Module, method: str | dict | PEFTMethod, selection: Selection | None = None
) -> dict[str, torch.Size]:
    """Shapes of the adapter parameters a method would add, without memory taken for them.

    Args:
        model: A model, or a backbone alone.
        method: The method, its name or its config.
        selection: What would be adapted. Defaults to None, all blocks of what is adapted or found.

    Returns:
        Shapes by the names in the backbone; of several, with the backbone's path.

    Raises:
        ValueError: The method or an option is unknown or out of range, or the
            method is not defined for the model.
    """
    built = method if isinstance(method, PEFTMethod) else build_method(method)
    selection = selection or Selection()
    injection = get_injection(model)
    backbones = backbones_of(model) if injection else find_backbones(unwrap(model), selection.backbones)
    shapes = {}
    for path, backbone in backbones.items():
        outside = find_classifiers(backbone) if selection.classifiers else []
        for attachment in plan(backbone, built.of(path), selection, outside):
            for key, adapter in attachment.adapters.items():
                for name, parameter in adapter.named_parameters():
                    full = attachment.path(f'{key}.{name}')
                    shapes[join(path, full) if len(backbones) > 1 else full] = parameter.shape
    return shapes


def _refuse_dropped_tokens(
    model: nn.Module, backbones: dict[str, nn.Module], method: PEFTMethod, selection: Selection
) -> None:
    """Refuse adapters that ask for the grid of tokens in masked pre-training, which drops some."""
    for path, backbone in backbones.items():
        hosts = [site.host for site in find_sites(backbone) if site.host is not None]
        host = next(filter(_drops_tokens, hosts), None)
        if host is None or backbone is model:
            continue
        if any(_asks_for_grid(a) for a in plan(backbone, method.of(path), selection, ())):
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
    method: str | dict | None = None,
    frozen_dtype: str | None = None,
    with_cp: bool = False,
    blocks: str | Sequence[int | str] = 'all',
    unfreeze: Sequence[str] = (),
    freeze: Sequence[str] = (),
    backbones: Sequence[str] | None = None,
    families: Sequence[BlockFamily | Mapping[str, Any]] = (),
    where: str | Sequence[str] | None = None,
    methods: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> Summary:
    """Put a PEFT method into a model, in place, or several methods into several of its modules.

    The model stays the same object, its parameter names stay what they were,
    and until the first training step so do its outputs, to the last bit (but
    for methods whose papers start otherwise: ssf, vpt, mona). The backbone
    is frozen, except for its adapters. All else (neck, head, classifier, text encoder) stays as it is.

    The backbone is found by structure: ``model.backbone``, ``model.image_encoder``, ``model.detector.backbone``, or
    whatever module holds the blocks, or the model itself. Copies that follow it by averaging (momentum encoders,
    teachers) get the same adapters, frozen, so that the averaging covers them.

    All is set once: a ``requires_grad`` that you set afterwards stays, whatever ``train()`` and ``eval()`` do.

    Args:
        model: A model, or a backbone alone.
        method: Name or config (``dict(type='icon', bottleneck=32)``) of the
            method: ``icon``, ``icon-static``, ``adaptformer``, ``adapter``, ``convpass``,
            ``lorand``, ``mona``, ``lora``, ``dora``, ``ssf``, ``vpt``, ``bitfit``, ``norm``,
            ``partial``, ``frozen``, ``full``. Defaults to None, ``icon``.
        frozen_dtype: The precision that frozen matrices of the backbone are held in. ``'bfloat16'`` takes half the
            memory of float32. ``'int8'``, ``'float8'`` (a quarter) and ``'nf4'`` (an eighth) quantise the weights of
            linear layers by torchao, and hold other matrices in bfloat16. The backbone runs under bfloat16 autocast,
            outputs are rounded, and :func:`remove` gives the rounded weights back. Defaults to None, as they are.
        with_cp: Whether adapted blocks, or layers of other towers, are recomputed in the backward pass (gradient
            checkpointing), also where the backbone has no such option. Defaults to False,
            which leaves it to the backbone.
        blocks: The blocks to adapt: ``'all'``, ``'first:2'``, ``'last:4'``, ``'stage:2'`` of a pyramid (from 0), or a
            list of such, of block numbers and of names or patterns (``'stages.2'``). Counted in each backbone. Unless
            it is ``'all'``, nothing outside of the chosen blocks is adapted. Defaults to ``'all'``.
        unfreeze: Patterns of the backbone's own parameters that are trained, too, and saved with the adapters, by
            their names in the backbone: ``['patch_embed.*', 'cls_token']``. ``*`` stands for anything, dots included;
            a module's name for all in it. BatchNorm whose parameters are all trained also learns its statistics.
            Defaults to none.
        freeze: Patterns of parameters beside the backbone that are not trained, by their names in the model:
            ``['neck.*', 'decode_head.conv_seg']``. BatchNorm among them keeps its statistics. Defaults to none.
        backbones: Paths of the backbones in the model, needed where it has several: ``['image_encoder']``. Defaults
            to None, the only one.
        families: Blocks that are to be known from now on, beside those that are: each a :class:`BlockFamily`, or what
            :func:`register_family` takes, e.g. ``dict(like='mmdet Swin', block='my_project.swin.SwinBlock')``. They
            win over known ones of the same class. Defaults to none.
        where: The modules to adapt (towers), by path or pattern: ``['encoder', 'decoder', '*language_model']``. They
            may be any, heads included. Only these are frozen. Defaults to None, the backbone.
        methods: A method for each tower, in the place of ``method`` and ``where``:
            ``[dict(where='backbone', type='icon'), dict(where=['encoder', 'decoder'], type='lora', rank=16)]``.
            Defaults to None, one method.
        **options: Options of the method, such as ``bottleneck=32``.

    Returns:
        What is trained now. Print it for a table.

    Raises:
        MissingExtraError: ``frozen_dtype`` needs torchao, which is not installed or too old.
        ValueError: The method or an option is unknown or out of range, the
            model is adapted already or wrapped, has no known block or several backbones, or does not have what was
            selected. The model is unchanged then.

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
    for family in register_families(families):
        _refuse_unmatched(model, family)
    built, paths = choose(model, method, backbones, where, methods, **options)
    current = get_injection(model)
    if current is not None:
        raise ValueError(f"the model is adapted already, by '{current.method.name}'; call remove(model) first")
    check_holdable(frozen_dtype, built)
    selection = Selection(blocks, unfreeze, freeze, paths)  # type: ignore[arg-type]
    adapt(model, built, selection, frozen_dtype, with_cp)
    return summarize(model)


def choose(
    model: nn.Module,
    method: str | dict | None = None,
    backbones: Sequence[str] | str | None = None,
    where: str | Sequence[str] | None = None,
    methods: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> tuple[PEFTMethod, Any]:
    """Build the method, or methods, of :func:`inject`, and find the paths of what they adapt.

    Returns:
        The method, and the paths; None for the only backbone.

    Raises:
        ValueError: Options exclude each other, or see :func:`inject`.
    """
    if methods is not None:
        given = dict(method=method, backbones=backbones, where=where, **options)
        excluded = [name for name, value in given.items() if value is not None]
        if excluded:
            raise ValueError(f'methods says what goes where, so {excluded[0]} cannot be given beside it')
        return build_towers(model, methods)
    if where is not None and backbones is not None:
        raise ValueError('where and backbones both name the modules to adapt; give one of them')
    built = build_method('icon' if method is None else method, **options)
    if where is None:
        return built, None if backbones is None else backbones if isinstance(backbones, str) else tuple(backbones)
    if not built.freezes:
        raise ValueError(f"where: method '{built.name}' trains the whole model as it is; leave `where` out")
    return built, find_towers(model, where)


def check_holdable(frozen_dtype: str | None, method: PEFTMethod) -> None:
    """Check that the frozen matrices of a method can be held in a precision.

    Raises:
        MissingExtraError: The precision needs a package that is not installed.
        ValueError: There is no such precision, or the method freezes nothing.
    """
    if frozen_dtype is None:
        return
    check_frozen_dtype(frozen_dtype)
    if not method.freezes:
        raise ValueError(f"method '{method.name}' freezes nothing that could be held in frozen_dtype={frozen_dtype!r}")


def _refuse_unmatched(model: nn.Module, family: BlockFamily) -> None:
    """Refuse a family that is given for a model which has no block of it.

    Raises:
        ValueError: It has none.
    """
    if any(family_of(module) is family for module in model.modules()):
        return
    paths = sorted(
        {class_path(type(m)) for m in model.modules() if str(type(m).__module__).partition('.')[0] != 'torch'}
    )
    raise ValueError(
        f"families: no module of {type(model).__name__} is a block of '{family.name}' ({family.block})"
        f'{near(family.block, paths)}, or one that overrides its forward; there are: {", ".join(paths[:20])}'
    )


def adapt(
    model: nn.Module,
    method: PEFTMethod,
    selection: Selection,
    frozen_dtype: str | None = None,
    with_cp: bool = False,
    hold: bool = True,
) -> Injection:
    """Do what :func:`inject` does, for a method that is made and an unadapted model.

    Args:
        model: The model.
        method: The method.
        selection: What is adapted and trained beside the method's own choice.
        frozen_dtype: Name of the precision to hold frozen matrices in. Defaults to None, their own.
        with_cp: Whether blocks are recomputed in the backward pass. Defaults to False.
        hold: Whether the matrices are rounded now. If not, :func:`hold_base` does so once nothing can fail any more.
            Defaults to True.

    Raises:
        ValueError: See there.
    """
    host = unwrap(model)
    read_maps_in_order()
    if method.freezes:
        check_host(host)
        backbones = find_backbones(host, selection.backbones)
        _refuse_dropped_tokens(host, backbones, method, selection)
    else:
        backbones = search(host).learning or {'': host}
    check_trainable(backbones, method, selection, host)
    copies = find_copies(host, backbones) if method.adapts else {}
    injection = Injection(backbones, method, frozen_dtype=frozen_dtype, with_cp=with_cp, selection=selection)
    try:
        frozen = selection.frozen_names(beside(host, injection))
        for copy_path, original in copies.items():
            _follow(host.get_submodule(copy_path), backbones[original], method.of(original), selection, frozen_dtype)
        _refresh_averages(host)
        _check_state(host)
    except Exception:
        _undo_all(host)
        raise
    if frozen:
        FrozenParts(host, frozen)
    if selection.backbones is not None and method.adapts:
        injection.initialisation = KeptInitialisation(host, PARTS)
    if method.adapts:
        injection.shared = make_shareable(host)
    if hold:
        hold_base(host)
    return injection


def hold_base(model: nn.Module) -> None:
    """Round the frozen matrices of an adapted model to the precision that they are to be held in."""
    host = unwrap(model)
    for injection in injections_of(host):
        for precision in injection.precisions:
            precision.hold()
    _refresh_averages(host)


def check_trainable(
    backbones: Mapping[str, nn.Module], method: PEFTMethod, selection: Selection, model: nn.Module | None = None
) -> None:
    """Refuse backbones that no gradient passes, where something in them is trained.

    Args:
        backbones: The backbones by path.
        method: The method.
        selection: What is adapted and trained beside the method's own choice.
        model: The model, where it is known. Defaults to None: each backbone is looked at alone.

    Raises:
        ValueError: Layers are quantised, or run without gradients.
    """
    for path, backbone in backbones.items():
        own = method.of(path)
        if own.adapts or not own.freezes or selection.unfreeze:
            check_gradients_pass(backbone, own.name)
        if own.adapts:
            check_reached(*((backbone, {'': backbone}) if model is None else (model, {path: backbone})), own.name)


def _follow(
    copy: nn.Module, original: nn.Module, method: PEFTMethod, selection: Selection, frozen_dtype: str | None
) -> None:
    """Give a copy that follows by averaging the adapters of its original, and its quantised weights."""
    named = None if selection.backbones is None else ('',)
    plain = Selection(blocks=selection.blocks, backbones=named, classifiers=selection.classifiers)
    # What the original trains in place is averaged, so it must have the same form in both.
    quantised = frozen_dtype if frozen_dtype in KINDS else None
    Injection(copy, method, frozen_dtype=quantised, selection=plain, follows=True)
    values = original.state_dict()
    with torch.no_grad():
        for name, value in copy.state_dict().items():
            if is_adapter(name):
                value.copy_(values[name])


def _refresh_averages(model: nn.Module) -> None:
    """Let MMEngine's averaging models know the parameters that their modules have now."""
    for averaged in averaged_models(model):
        module: Any = averaged.module
        averaged.avg_parameters = module.state_dict() if averaged.update_buffers else dict(module.named_parameters())


def _check_state(model: nn.Module) -> None:
    """Refuse models whose state dict does not have the adapters."""
    kept = model.state_dict()
    places = {path: module for path, module in model.named_modules() if _KEY in vars(module)}
    lost = [
        full
        for path, module in places.items()
        for name, _ in module.named_parameters()
        if is_adapter(name) and (full := join(path, name)) not in kept
    ]
    if lost:
        raise ValueError(
            f'{type(model).__name__} leaves adapters out of its state_dict(), such as {lost[0]}: they would be lost on '
            'saving. A module in it drops what is not its own; adapt what lies in that'
        )


def _undo_all(model: nn.Module, restore: bool = True) -> None:
    parts = vars(model).get(FrozenParts.KEY)
    if parts is not None:
        parts.release()
    for injection in injections_of(model):
        injection.undo(restore)
    if hasattr(model, PARTS):
        delattr(model, PARTS)
    _refresh_averages(model)


def beside(model: nn.Module, injection: Injection) -> list[str]:
    """Names of a model's parameters beside its backbones, classifiers within them included."""
    inside = {
        id(p)
        for path, backbone in injection.backbones.items()
        for n, p in backbone.named_parameters()
        if not is_below(n, injection.outside[path])
    }
    return [n for n, p in model.named_parameters() if id(p) not in inside and not is_below(n, [PARTS])]


def remove(model: nn.Module) -> None:
    """Take the PEFT method out again: same keys, same outputs, same gradients as before.

    Parameters of the base that were trained in place (``unfreeze``) get the values of the base back.

    Args:
        model: An adapted model.

    Raises:
        ValueError: The model is not adapted, or the values of the base are not known.
    """
    injection = get_injection(model)
    if injection is None:
        raise ValueError(f'{type(unwrap(model)).__name__} is not adapted: there is nothing to remove')
    backbones_of(model)  # all of what was adapted together
    for base in injection.trained.values():
        base.check()
    held = [precision.name for precision in injection.precisions if precision.is_active]
    _undo_all(unwrap(model))
    tell_rounded(held[0] if held else None)


@dataclass
class _Merged:
    """What :func:`unmerge` needs: the adapter, and what merging changed."""

    name: str
    method: PEFTMethod
    selection: Selection
    frozen_dtype: str | None
    with_cp: bool
    adapter: dict[str, Tensor]
    unfrozen: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]
    norms: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]
    base: list[tuple[nn.Parameter, Tensor]] | None
    packed: list[dict[str, Tensor]]  # of the quantised base
    digest: str = ''  # of the merged backbones


def _digest(backbones: Mapping[str, nn.Module]) -> str:
    """SHA-256 of all parameters of backbones."""
    digest = hashlib.sha256()
    for backbone in backbones.values():
        for parameter in backbone.parameters():
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def merge(model: nn.Module, safe: bool = True, keep_base: bool = True, dequantize: bool = False) -> None:
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
        dequantize: Whether a base that is held in 8 or 4 bits may take its floating-point size again, with the
            rounded values. Defaults to False, an error for such a base.

    Raises:
        ValueError: The model is not adapted, its base is quantised and ``dequantize`` is False, it has other
            adapters on the same base, its method computes what no weight of the base can, or the
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
    if injection.frozen_dtype in KINDS and not dequantize:
        raise ValueError(
            f'the base is held in {injection.frozen_dtype}, and merging would turn it into floating point with the '
            'rounded values; pass dequantize=True for that'
        )
    attachments = [a for a in adapter.attachments if isinstance(a, WeightMergingAttachment)]
    if not attachments or len(attachments) < len(adapter.attachments):
        raise ValueError(
            f"method '{_unmergeable(adapter)}' cannot be merged into the base weights; those that can: lora, dora, "
            'ssf, bitfit, norm, partial'
        )
    for attachment in attachments if safe else ():
        for weight, (_, value) in attachment.merged_weights().items():
            if not torch.isfinite(value).all():
                raise ValueError(
                    f"merging would put NaN or infinity into {attachment.path(weight)}: the adapter '{name}' diverged. "
                    'Take a checkpoint from before that, or pass safe=False'
                )
    backbones_of(model)  # all of what was adapted together
    host = unwrap(model)
    for base in injection.trained.values():
        base.check()
    record = _Merged(
        name,
        adapter.method,
        adapter.selection,
        injection.frozen_dtype,
        injection.with_cp,
        {n: t.detach().clone() for n, t in adapter.state().items()},
        {path: (base.base_values(), base.trained_values()) for path, base in injection.trained.items()},
        {path: account.norm_values() for path, account in injection.accounts.items() if account.norms},
        [] if keep_base else None,
        [precision.packed() for precision in injection.precisions] if keep_base else [],
    )
    for follower in injections_of(model):
        if follower is not injection:
            attachments += [a for a in follower.attachments if isinstance(a, WeightMergingAttachment)]
    backbone = next(iter(injection.backbones.values()))
    merged = [pair for a in attachments for pair in a.merged_weights().values()]
    _undo_all(host, restore=False)
    if record.base is not None:
        record.base += [(parameter, parameter.detach().clone()) for parameter, _ in merged]
    with torch.no_grad():
        for parameter, value in merged:
            parameter.copy_(value)
    if keep_base:
        record.digest = _digest(injection.backbones)
    setattr(backbone, _MERGED, record)


def _unmergeable(adapter: NamedAdapter) -> str:
    """Name the first method of an adapter that cannot be merged."""
    pairs = zip(adapter.paths, adapter.attachments)
    paths = [path for path, attachment in pairs if not isinstance(attachment, WeightMergingAttachment)]
    return adapter.method.of(paths[0]).name if paths else adapter.method.name


def merged_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that was merged into the base weights of a model; None if there is none."""
    records = [vars(module)[_MERGED] for module in unwrap(model).modules() if _MERGED in vars(module)]
    return records[0].name if records else None


def unmerge(model: nn.Module) -> None:
    """Take a merged adapter out of the base weights again, which are then what they were to the last bit.

    The model is adapted as before :func:`merge`: neck and head stay as they are.

    Args:
        model: A model whose adapter was merged.

    Raises:
        ValueError: No adapter was merged into it, ``keep_base=False`` was given, or the weights
            have changed since the merge. The model is unchanged then.
    """
    host = unwrap(model)
    holders = [module for module in host.modules() if _MERGED in vars(module)]
    if not holders:
        raise ValueError(f'no adapter was merged into {type(host).__name__}: there is nothing to unmerge')
    record: _Merged = vars(holders[0])[_MERGED]
    if record.base is None:
        raise ValueError(
            'the adapter was merged with keep_base=False, so its base is gone; load the base weights again'
        )
    if get_injection(model) is not None:
        raise ValueError('the model is adapted anew; call remove(model) first')
    backbones = find_backbones(host, record.selection.backbones)
    if _digest(backbones) != record.digest:
        raise ValueError(
            'weights of the backbone have changed since the merge (loaded, trained or cast), so the adapter can no '
            'longer be taken out of them; load the base weights and then the adapter file'
        )
    with torch.no_grad():
        for parameter, value in record.base:
            parameter.copy_(value)
    for path, (base, _) in (*record.unfrozen.items(), *record.norms.items()):
        set_values(backbones[path], base)
    injection = adapt(host, record.method, record.selection, record.frozen_dtype, record.with_cp)
    for precision, values in zip(injection.precisions, record.packed):
        precision.set_packed(values)
    if record.name != DEFAULT_NAME:
        injection.rename(DEFAULT_NAME, record.name)
    injection.adapters[record.name].load(record.adapter)
    for path, (_, trained) in record.unfrozen.items():
        injection.trained[path].begin()
        set_values(backbones[path], trained)
    for path, (_, trained) in record.norms.items():
        injection.accounts[path].train_norms(set(trained))
        set_values(backbones[path], trained)
    delattr(holders[0], _MERGED)


def summarize(model: nn.Module) -> Summary:
    """Count what a model trains, adapted or not.

    Args:
        model: Any model.

    Returns:
        The counts. Print it for a table.
    """
    model = unwrap(model)
    injection = get_injection(model)
    backbones = backbones_of(model)
    kinds: dict[int, str] = {}
    for backbone in backbones.values():
        outside = [] if injection is None else outside_of(injection, backbone)
        for name, parameter in named_weights(backbone):
            if not is_below(name, outside):
                kinds[id(parameter)] = 'adapters' if injection is not None and is_adapter(name) else 'backbone'
    paths = list(backbones)

    def part_of(name: str) -> str:
        """The outermost module that holds no backbone."""
        words = name.split('.')
        for end in range(1, len(words)):
            part = '.'.join(words[:end])
            if not any(is_below(path, [part]) for path in paths):
                return part
        return name

    adapters_of = injection.adapters.values() if injection else ()
    kinds.update((id(p), 'inactive adapters') for adapter in adapters_of if adapter.trained for p in adapter.trained)
    parts: dict[str, tuple[int, int]] = {}
    for name, parameter in named_weights(model):
        part = kinds.get(id(parameter)) or part_of(name)
        trained, total = parts.get(part, (0, 0))
        parts[part] = (trained + parameter.numel() * parameter.requires_grad, total + parameter.numel())

    trainable = sum(trained for trained, _ in parts.values())
    own_trained, own_total = parts.get('backbone', (0, 0))
    adapters_trained, adapters = parts.get('adapters', (0, 0))
    sites: dict[str, list[str]] = {}
    for name, attachment in injection.named_attachments().items() if injection else ():
        sites.setdefault(attachment.kind, []).append(name)
    return Summary(
        method=injection.current.method.name if injection and injection.current else None,
        trainable=trainable,
        frozen=sum(total for _, total in parts.values()) - trainable,
        adapters=adapters,
        backbone=own_total,
        backbone_share=(own_trained + adapters_trained) / max(own_total, 1),
        sites=sites,
        parts=parts,
        backbones=paths,
        unfrozen=injection.trained_names() if injection else [],
        towers=_towers(injection, backbones) if injection else {},
        following=[
            name
            for name, module in model.named_modules()
            if injection is not None and _KEY in vars(module) and vars(module)[_KEY] is not injection
        ],
    )


def _towers(injection: Injection, backbones: Mapping[str, nn.Module]) -> dict[str, TowerSummary]:
    """Count what is trained in each adapted module, by its path in the model."""
    towers = {}
    current = injection.current
    for path, tower in backbones.items():
        own, outside = injection.path_of(tower), outside_of(injection, tower)
        named = [(n, p) for n, p in named_weights(tower) if not is_below(n, outside)]
        places = zip(current.paths, current.attachments) if current else ()
        towers[path] = TowerSummary(
            injection.method.of(own).name,
            sum(p.numel() for _, p in named if p.requires_grad),
            sum(p.numel() for n, p in named if not is_adapter(n)),
            dict(Counter(attachment.kind for place, attachment in places if place == own)),
        )
    return towers


def outside_of(injection: Injection, backbone: nn.Module) -> list[str]:
    """Names of what lies in one of the backbones and is not its own: classifiers, and modules of other parts."""
    return injection.outside[injection.path_of(backbone)]


def classifiers_of(injection: Injection, backbone: nn.Module) -> list[str]:
    """Names of the classifiers in one of the backbones."""
    return [name for name in outside_of(injection, backbone) if name not in borrowed_modules(backbone)]
