"""The frozen prefix of a backbone: found, recorded once, and replayed (ours).

With ``blocks='last:4'`` everything before the first adapted block is constant for an image. What the trained part
reads of it is recorded: the inputs of the first trained modules, and outputs that no trained module changes. In a
replay the backbone's own ``forward`` runs on a blank image, its frozen blocks are passed over, and the recorded
tensors take the places of what the trained part reads. So any host works whose prefix is a sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .backbones import is_below
from .calls import PerThread
from .freezing import is_adapter
from .injection import Injection
from .replacement import Replacement
from .sites import find_sites

OUTPUT = 'output'  # the place of what the backbone returns
_SAMPLES = 4096  # elements by which the inputs of blocks are compared

Arguments = tuple[tuple, dict[str, Any]]
Values = dict[str, Tensor]


class PrefixError(ValueError):
    """The prefix of a model cannot be computed once."""


@dataclass(frozen=True)
class PrefixValue:
    """A tensor of the prefix that the trained part reads.

    Attributes:
        place: Name of the module that reads it; ``'output'`` for an output of the backbone.
        call: Which call of the module, from 0.
        leaf: Which of the tensors in its arguments, or in the output.
        rows: Rows of the first dimension for each image.
        order: The dimensions, from the largest stride to the smallest.
    """

    place: str
    call: int
    leaf: int
    rows: int
    order: tuple[int, ...]

    @property
    def key(self) -> tuple[str, int, int]:
        """Place, call and leaf."""
        return self.place, self.call, self.leaf

    @property
    def name(self) -> str:
        """Its name in a record."""
        return f'{self.place}/{self.call}/{self.leaf}'


@dataclass(frozen=True)
class PrefixPlan:
    """What is recorded of a backbone, and what a replay passes over.

    Attributes:
        values: What is recorded.
        blocks: Frozen blocks that a replay does not run. Of each, how many of its first arguments it gives back as a
            tuple; 0 for its first argument alone.
        later: Blocks after the prefix that need not run while it is recorded, in the same form.
        first: The first trained module; None if nothing in the backbone is trained.
    """

    values: tuple[PrefixValue, ...]
    blocks: Mapping[str, int]
    later: Mapping[str, int]
    first: str | None

    @property
    def ends_early(self) -> bool:
        """Whether nothing of the backbone's output is recorded, so that a recording ends before it."""
        return all(value.place != OUTPUT for value in self.values)


class _Done(BaseException):
    """Ends a forward pass of which no more is needed."""


_run = PerThread()


class _Tap(Replacement):
    """Stands in for a module of the backbone, and asks the current run what to do.

    Args:
        prefix: The prefix that the run must belong to.
        module: The module.
        name: Its name in the backbone.
    """

    def __init__(self, prefix: FrozenPrefix, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.prefix = prefix
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or what the run has in its place."""
        run = _run.value
        if run is None or run.prefix is not self.prefix:
            return self.host_forward(*args, **kwargs)
        if self.module is self.prefix.backbone:
            return run.backbone(self, args, kwargs)
        return run.module(self, args, kwargs)


class _Run:
    """One forward pass of a model; the base of what is done in it."""

    def __init__(self, prefix: FrozenPrefix) -> None:
        self.prefix = prefix
        self.calls: Counter[str] = Counter()

    def __enter__(self) -> _Run:
        self._outer, _run.value = _run.value, self
        return self

    def __exit__(self, *error: Any) -> None:
        _run.value = self._outer

    def backbone(self, tap: _Tap, args: tuple, kwargs: dict) -> Any:
        """Run the backbone."""
        return tap.host_forward(*args, **kwargs)

    def module(self, tap: _Tap, args: tuple, kwargs: dict) -> Any:
        """Run a tapped module of the backbone."""
        return tap.host_forward(*args, **kwargs)

    def next_call(self, name: str) -> int:
        """Count a call of a module."""
        self.calls[name] += 1
        return self.calls[name] - 1


class _Capture(_Run):
    """Ends where the backbone is called, and keeps its arguments."""

    arguments: Arguments | None = None

    def backbone(self, tap: _Tap, args: tuple, kwargs: dict) -> Any:
        self.arguments = args, kwargs
        raise _Done


@dataclass
class _Log:
    """What a watched pass saw.

    Attributes:
        leaves: Arguments of trained modules, and the output, by place and call.
        samples: Some elements of what frozen blocks read, by block and call.
        outputs: Of blocks that may be passed over, since their output is shaped like their first arguments, how many
            of those they give back as a tuple; 0 for the first alone. None for other blocks.
        order: Names of modules in the order of their first calls.
        random: Frozen modules in which, or before which, random numbers were drawn.
    """

    leaves: dict[tuple[str, int], list[Any]] = field(default_factory=dict)
    samples: dict[tuple[str, int], list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, int | None] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    random: list[str] = field(default_factory=list)


class _Watch(_Run):
    """Runs the whole backbone, and logs what passes.

    Args:
        prefix: The prefix.
        noise: Arguments of trained modules that are replaced by noise, by place, call and leaf. Defaults to none.
        blocks: Frozen blocks in which random numbers are looked for. Defaults to none.
    """

    def __init__(
        self, prefix: FrozenPrefix, noise: AbstractSet[tuple[str, int, int]] = frozenset(), blocks: Sequence[str] = ()
    ) -> None:
        super().__init__(prefix)
        self.noise = noise
        self.blocks = blocks
        self.log = _Log()
        self._generator = torch.Generator().manual_seed(0)
        self._state: Tensor | None = None
        self._trained_ran = False

    def backbone(self, tap: _Tap, args: tuple, kwargs: dict) -> Any:
        self._state = _random_state(args)
        out = tap.host_forward(*args, **kwargs)
        self.log.leaves[OUTPUT, 0] = _copies(tree_flatten(out)[0])
        return out

    def module(self, tap: _Tap, args: tuple, kwargs: dict) -> Any:
        name, call, log = tap.name, self.next_call(tap.name), self.log
        leaves, spec = tree_flatten((args, kwargs))
        if name not in log.order:
            log.order.append(name)
        if self._drew(args) and (name in self.blocks or not self._trained_ran):
            log.random.append(name)
        if name in self.prefix.trained:
            self._trained_ran = True
            log.leaves[name, call] = _copies(leaves)
            leaves = [self._noisy(x) if (name, call, i) in self.noise else x for i, x in enumerate(leaves)]
            args, kwargs = tree_unflatten(leaves, spec)
        else:
            log.samples[name, call] = [_some(x) for x in leaves if isinstance(x, Tensor)]
        out = tap.host_forward(*args, **kwargs)
        if log.outputs.get(name, 0) is not None:
            log.outputs[name] = _outputs_like(out, args)
        if self._drew(args) and name in self.blocks:
            log.random.append(name)
        return out

    def _drew(self, args: tuple) -> bool:
        """Whether random numbers were drawn since the last time."""
        before, self._state = self._state, _random_state(args)
        return before is not None and not torch.equal(before, self._state)

    def _noisy(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self._generator).to(x)
        return x + (1 + x.abs().amax()) * noise


class _Recording(_Run):
    """Computes the prefix, and keeps what the plan names.

    Attributes:
        records: Of each call of the backbone, the tensors by name.
    """

    def __init__(self, prefix: FrozenPrefix, plan: PrefixPlan, stop: bool) -> None:
        super().__init__(prefix)
        self.plan = plan
        self.stop = stop
        self.records: list[Values] = []
        self._wanted: dict[tuple[str, int], list[PrefixValue]] = {}
        for value in plan.values:
            self._wanted.setdefault((value.place, value.call), []).append(value)

    def _keep(self, place: tuple[str, int], leaves: list[Any]) -> None:
        for value in self._wanted.get(place, ()):
            self.records[-1][value.name] = leaves[value.leaf].detach()

    def backbone(self, tap: _Tap, args: tuple, kwargs: dict) -> Any:
        self.records.append({})
        self.calls.clear()
        out = tap.host_forward(*args, **kwargs)
        self._keep((OUTPUT, 0), tree_flatten(out)[0])
        if self.stop:
            raise _Done
        return out

    def module(self, tap: _Tap, args: tuple, kwargs: dict) -> Any:
        name, call = tap.name, self.next_call(tap.name)
        if (name, call) in self._wanted:
            self._keep((name, call), tree_flatten((args, kwargs))[0])
            if self.stop and self.plan.ends_early and len(self.records[-1]) == len(self.plan.values):
                raise _Done
        if name in self.plan.later:
            return _passed(self.plan.later[name], tap, args, kwargs)
        return tap.host_forward(*args, **kwargs)


class Replay(_Run):
    """Puts recorded tensors into the places of what the trained part reads.

    Args:
        prefix: The prefix.
        plan: What was recorded.
        records: Of each call of the backbone, the tensors by name, of all images of the batch.
    """

    def __init__(self, prefix: FrozenPrefix, plan: PrefixPlan, records: Sequence[Values]) -> None:
        super().__init__(prefix)
        self.plan = plan
        self.records = list(records)
        self.used = 0
        self._values: dict[tuple[str, int], list[PrefixValue]] = {}
        for value in plan.values:
            self._values.setdefault((value.place, value.call), []).append(value)

    def begin(self) -> None:
        """Replay in this thread from now on."""
        _run.value = self

    def end(self) -> None:
        """Replay no more.

        Raises:
            RuntimeError: The backbone was called less often than when the records were made.
        """
        _run.value = None
        if self.used != len(self.records):
            raise self._wrong_count()

    def _wrong_count(self) -> RuntimeError:
        return RuntimeError(
            f'the model called its backbone {self.used} times for a batch whose prefix was recorded with '
            f'{len(self.records)} calls. The prefix cache needs the same calls in every step: train without '
            'prefix_cache'
        )

    def _replaced(self, place: tuple[str, int], leaves: list[Any]) -> None:
        for value in self._values.get(place, ()):
            recorded = self.records[self.used - 1][value.name]
            live = leaves[value.leaf]
            if recorded.shape != live.shape:
                raise RuntimeError(
                    f'{value.place} reads a tensor of the shape {tuple(live.shape)}, and the prefix cache holds '
                    f'{tuple(recorded.shape)}; its images are of another size. Delete the cache'
                )
            leaves[value.leaf] = _ordered(recorded.to(live.device), value.order)

    def backbone(self, tap: _Tap, args: tuple, kwargs: dict) -> Any:
        """Run the backbone, and replace outputs that only the prefix makes."""
        self.used += 1
        self.calls.clear()
        if self.used > len(self.records):
            raise self._wrong_count()
        out = tap.host_forward(*args, **kwargs)
        if (OUTPUT, 0) not in self._values:
            return out
        leaves, spec = tree_flatten(out)
        self._replaced((OUTPUT, 0), leaves)
        return tree_unflatten(leaves, spec)

    def module(self, tap: _Tap, args: tuple, kwargs: dict) -> Any:
        """Pass over a frozen block, or run a trained module on recorded tensors."""
        name = tap.name
        if name in self.plan.blocks:
            return _passed(self.plan.blocks[name], tap, args, kwargs)
        place = name, self.next_call(name)
        if place in self._values:
            leaves, spec = tree_flatten((args, kwargs))
            self._replaced(place, leaves)
            args, kwargs = tree_unflatten(leaves, spec)
        return tap.host_forward(*args, **kwargs)


class FrozenPrefix:
    """The prefix of an adapted backbone.

    Outside of a run its taps pass every call on.

    Args:
        injection: What was injected into the model.

    Attributes:
        backbone: The backbone.
        trained: Names of the modules at which something trained begins: blocks, or single layers outside of blocks.

    Raises:
        PrefixError: There are several backbones, the method trains them, or a parameter is trained that acts outside
            of any module that could be run by itself.
    """

    def __init__(self, injection: Injection) -> None:
        if not injection.method.freezes:
            raise PrefixError(
                f"prefix_cache: method '{injection.method.name}' trains the whole backbone, so no part of it can be "
                'computed once. Use a method that freezes it'
            )
        if len(injection.backbones) > 1:
            raise PrefixError(
                f'prefix_cache works with one adapted backbone; this model has {len(injection.backbones)}: '
                f'{", ".join(map(repr, injection.backbones))}'
            )
        self.backbone = injection.backbone
        sites = find_sites(self.backbone)
        if not sites and injection.selection.backbones is not None:
            raise PrefixError(
                f'prefix_cache needs an image encoder with known blocks: {next(iter(injection.backbones))!r} has none'
            )
        self.sites = [site.name for site in sites]
        self.trained = self._find_trained(injection)
        modules = dict(self.backbone.named_modules())
        names = dict.fromkeys([*self.sites, *self.trained])
        self._taps = [_Tap(self, modules[name], name) for name in names] + [_Tap(self, self.backbone, '')]
        self._installed = False

    def _find_trained(self, injection: Injection) -> list[str]:
        owners = {a.name: a.name for a in injection.attachments}
        for name, parameter in self.backbone.named_parameters():
            if parameter.requires_grad:
                owner = name.rpartition('.')[0]
                while is_adapter(owner):
                    owner = owner.rpartition('.')[0]
                owners.setdefault(owner, name)
        found: dict[str, None] = {}
        for owner, name in owners.items():
            around = [site for site in self.sites if is_below(owner, [site])]
            if not around and (not owner or any(is_below(site, [owner]) for site in self.sites)):
                raise PrefixError(
                    f"prefix_cache: '{name}' of the backbone is trained, and it acts before the blocks, so nothing "
                    'before it is constant. Take it out of `unfreeze`, or train without prefix_cache'
                )
            found[min(around, key=len) if around else owner] = None
        return list(found)

    @contextmanager
    def installed(self) -> Iterator[FrozenPrefix]:
        """Tap the backbone within a context."""
        self.install()
        try:
            yield self
        finally:
            self.remove()

    def install(self) -> None:
        """Tap the backbone."""
        if not self._installed:
            for tap in self._taps:
                tap.replace()
        self._installed = True

    def remove(self) -> None:
        """Give the modules back their ``forward``."""
        if self._installed:
            for tap in reversed(self._taps):
                tap.restore()
        self._installed = False

    def arguments(self, forward: Callable[[], Any]) -> Arguments:
        """What a model calls its backbone with. The pass ends there.

        Args:
            forward: Calls the model.

        Raises:
            PrefixError: It does not call the backbone.
        """
        with torch.no_grad(), _Capture(self) as run:
            _until_done(forward)
        if run.arguments is None:  # type: ignore[attr-defined]
            raise PrefixError('prefix_cache: the model does not call its backbone in a forward pass')
        return run.arguments  # type: ignore[attr-defined]

    @torch.no_grad()
    def plan(self, true: Arguments, swapped: Arguments, blank: Arguments) -> PrefixPlan:
        """Find out what has to be recorded, by a few passes over two images, and check that a replay gives the same.

        A value belongs to the prefix if it depends on the image but not on what the trained modules read. Blank
        images show the first, noise at the trained modules shows the second.

        Args:
            true: Arguments of the backbone for two images.
            swapped: The same, with the images in the other order.
            blank: The same, for a blank image.

        Raises:
            PrefixError: No block comes before the first trained module, the prefix draws random numbers, images of a
                batch influence each other, or the trained part reads the image past the recorded tensors.
        """
        if self.sites and self.sites[0] in self.trained:
            raise self._nothing_before(self.sites[0])  # without a pass
        with self._mode(False):
            seen, empty = self._watch(true), self._watch(blank)
            content = {
                (*place, i)
                for place, leaves in seen.leaves.items()
                for i, leaf in enumerate(leaves)
                if _is_data(leaf) and not _same(leaf, empty.leaves[place][i])
            }
            noisy = self._watch(true, {key for key in content if key[0] != OUTPUT})
            upstream = [
                key for key in content if key[:2] in noisy.leaves and _same(_leaf(seen, key), _leaf(noisy, key))
            ]
            first = next((name for name in seen.order if name in self.trained), None)
            passable = {n: count for n in self.sites if (count := seen.outputs.get(n)) is not None}
            blocks = {
                name: count
                for name, count in passable.items()
                if name not in self.trained and self._is_upstream(name, seen, noisy)
            }
            if not blocks:
                raise self._nothing_before(first)
            batch = _batch_of(true)
            values = tuple(self._value(key, _leaf(seen, key), batch) for key in sorted(upstream))
            later = {name: count for name, count in passable.items() if name not in blocks}
            plan = PrefixPlan(values, blocks, later, first)
            self._check_samples(plan, seen, self._watch(swapped), batch)
            self._check_replay(plan, seen, blank)
        with self._mode(True):
            self._check_training(plan, seen, self._watch(true, blocks=list(blocks)))
        return plan

    def record(self, plan: PrefixPlan, forward: Callable[[], Any], stop: bool = True) -> list[Values]:
        """Compute the prefix of a batch.

        Args:
            plan: What to record.
            forward: Calls the model.
            stop: Whether to end after the first call of the backbone. Defaults to True.

        Returns:
            Of each call of the backbone, the tensors (rows of all images, ...) by name.
        """
        with torch.no_grad(), _Recording(self, plan, stop) as run:
            _until_done(forward)
        return run.records  # type: ignore[attr-defined]

    def _watch(
        self, arguments: Arguments, noise: AbstractSet[tuple[str, int, int]] = frozenset(), blocks: Sequence[str] = ()
    ) -> _Log:
        with _Watch(self, noise, blocks) as run:
            self.backbone(*arguments[0], **arguments[1])
        return run.log  # type: ignore[attr-defined]

    @contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        modes = [(module, module.training) for module in self.backbone.modules()]
        self.backbone.train(training)
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    def _is_upstream(self, name: str, seen: _Log, noisy: _Log) -> bool:
        calls = [call for call in seen.samples if call[0] == name]
        return bool(calls) and all(
            _same(a, b) for call in calls for a, b in zip(seen.samples[call], noisy.samples[call])
        )

    def _value(self, key: tuple[str, int, int], leaf: Tensor, batch: int) -> PrefixValue:
        if leaf.shape[0] % batch:
            raise PrefixError(
                f'prefix_cache: {key[0]} reads a tensor of the shape {tuple(leaf.shape)} for {batch} images, of which '
                'no row belongs to one image'
            )
        strides = leaf.stride()
        order = tuple(sorted(range(leaf.dim()), key=lambda d: (-strides[d], d)))
        return PrefixValue(*key, rows=leaf.shape[0] // batch, order=order)

    def _nothing_before(self, first: str | None) -> PrefixError:
        if not self.sites:
            return PrefixError(
                f'prefix_cache: {type(self.backbone).__name__} has no known Transformer blocks to pass over'
            )
        if first is None:
            return PrefixError('prefix_cache: no frozen block of this backbone can be passed over')
        return PrefixError(
            f"prefix_cache: '{first}' is trained, and no frozen block comes before it, so there is nothing to compute "
            f"once. Adapt later blocks only, e.g. blocks='last:{max(1, len(self.sites) // 3)}', and unfreeze nothing "
            'before them'
        )

    def _check_samples(self, plan: PrefixPlan, seen: _Log, swapped: _Log, batch: int) -> None:
        for value in plan.values:
            a, b = (_leaf(log, value.key).unflatten(0, (batch, value.rows)) for log in (seen, swapped))
            if not _same(a, b.flip(0)):
                raise PrefixError(
                    f'prefix_cache: what {value.place} reads of an image depends on the other images of the batch, so '
                    'it cannot be computed once'
                )

    def _check_replay(self, plan: PrefixPlan, seen: _Log, blank: Arguments) -> None:
        records = {value.name: _leaf(seen, value.key) for value in plan.values}
        with Replay(self, plan, [records]):
            out = tree_flatten(self.backbone(*blank[0], **blank[1]))[0]
        for made, expected in zip(out, seen.leaves[OUTPUT, 0]):
            if _is_data(expected) and not _same(made, expected):
                raise PrefixError(
                    f'prefix_cache: the prefix of {type(self.backbone).__name__} is not a sequence. Besides what '
                    f"'{plan.first}' reads, the image reaches later layers on another way, so blocks before it cannot "
                    'be passed over. Train without prefix_cache'
                )

    def _check_training(self, plan: PrefixPlan, seen: _Log, trained: _Log) -> None:
        changed = [
            v.place
            for v in plan.values
            if v.place != OUTPUT
            and not _same(_leaf(seen, (v.place, v.call, v.leaf)), _leaf(trained, (v.place, v.call, v.leaf)))
        ]
        for place in [*trained.random, *changed]:
            drops = [
                f'{name} ({type(module).__name__})'
                for name, module in self.backbone.named_modules()
                if _drops(module) and not is_below(name, self.trained) and not is_adapter(name)
            ]
            raise PrefixError(
                f"prefix_cache: in training the frozen layers up to '{place}' draw random numbers or compute otherwise "
                'than in evaluation, so what they give cannot be computed once'
                + (f'. There is dropout in {len(drops)} of them, such as {drops[0]}' if drops else '')
                + '. Set drop_rate=0 and drop_path_rate=0 in the backbone, or train without prefix_cache'
            )


def _until_done(forward: Callable[[], Any]) -> None:
    with suppress(_Done):
        forward()


def _passed(outputs: int, tap: _Tap, args: tuple, kwargs: dict) -> Any:
    """What a block gives that is passed over: its input."""
    args, kwargs = tap.input_first(args, kwargs)
    return tuple(args[:outputs]) if outputs else args[0]


def _outputs_like(out: Any, args: tuple) -> int | None:
    """How many of the first arguments the output is shaped like, 0 for a tensor; None if it is not."""
    outs = (out,) if isinstance(out, Tensor) else out
    if not isinstance(outs, tuple) or len(args) < len(outs):
        return None
    for o, a in zip(outs, args):
        if not isinstance(o, Tensor) or not isinstance(a, Tensor) or o.shape != a.shape or o.dtype != a.dtype:
            return None
    return 0 if isinstance(out, Tensor) else len(outs)


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 0


def _copies(leaves: list[Any]) -> list[Any]:
    return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _some(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    return flat[:: max(1, len(flat) // _SAMPLES)].clone()


def _leaf(log: _Log, key: tuple[str, int, int]) -> Tensor:
    return log.leaves[key[:2]][key[2]]


def _same(a: Tensor, b: Tensor, rounding: float = 1e-6) -> bool:
    """Whether two tensors hold the same values, up to rounding, and on a GPU up to what its kernels may vary."""
    if a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    a, b = a.double(), b.double()
    tolerance = 1e-3 if a.is_cuda else rounding
    return bool((a - b).abs().amax() <= tolerance * a.abs().amax())


def _batch_of(arguments: Arguments) -> int:
    return next(x for x in tree_flatten(arguments)[0] if isinstance(x, Tensor)).shape[0]


def _random_state(args: tuple) -> Tensor:
    device = next((x.device for x in tree_flatten(args)[0] if isinstance(x, Tensor)), torch.device('cpu'))
    return torch.cuda.get_rng_state(device) if device.type == 'cuda' else torch.get_rng_state()


def _drops(module: nn.Module) -> bool:
    rates = (getattr(module, name, None) for name in ('p', 'drop_prob'))
    return any(isinstance(rate, (int, float)) and rate > 0 for rate in rates)


def _ordered(x: Tensor, order: Sequence[int]) -> Tensor:
    """Lay a tensor out in memory with its dimensions in an order, as it was when it was recorded."""
    if list(order) == sorted(order):
        return x.contiguous()
    inverse = [list(order).index(d) for d in range(len(order))]
    return x.permute(*order).contiguous().permute(*inverse)
