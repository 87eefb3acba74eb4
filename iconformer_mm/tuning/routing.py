"""The way of a mixed batch through a model: the base once over all samples, then each through its neck and head."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from iconformer_mm.compat import left_to_python

from .attachments import Joint, Override, Switch
from .attachments.mixed import Mixing, RowProbe, Rows, put
from .replacement import Replacement, with_forward, with_values


@dataclass(frozen=True)
class MixedSamples(Override):
    """A mixed batch that is on its way.

    Attributes:
        adapters: The adapter of each sample.
    """

    adapters: tuple[str | None, ...]

    def run(self, joint: Joint, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Refuse to run a block outside of a call of the backbone."""
        raise ValueError(
            'within mixed(), blocks run only in a call of the whole backbone, which knows the samples: call the model '
            'or backbone that was given to mixed()'
        )

    def check(self, module: nn.Module, x: Any) -> None:
        """Refuse what is no batch of these samples, or cannot be computed now."""
        name = type(module).__name__
        if module.training:
            raise ValueError(f'{name} is in training mode, and mixed() is for prediction: call model.eval() first')
        if torch.is_grad_enabled():
            raise ValueError('gradients were switched on within mixed(), which computes none: train one adapter')
        if not isinstance(x, Tensor):
            sizes = {tuple(each.shape) for each in x if isinstance(each, Tensor)} if isinstance(x, Sequence) else set()
            if len(sizes) > 1:
                raise ValueError(_unequal(sizes))
            raise ValueError(
                f'{name} was called with a {type(x).__name__}; mixed() needs a tensor with a batch of images'
            )
        if len(x) != len(self.adapters):
            raise ValueError(
                f'mixed() was given {len(self.adapters)} adapters for a batch of {len(x)}: give one for each sample'
            )


@dataclass(frozen=True)
class Mixture(MixedSamples):
    """A mixed batch that is on its way to the backbone.

    Attributes:
        order: Numbers of the samples in the order in which the backbone sees them.
        mixing: What runs within the backbone.
        parts: Necks and heads by their paths in the model, each with the numbers of its samples. Empty if all samples
            have the same.
        is_routed: Whether the batch has reached the model, which takes care of necks and heads.
    """

    order: tuple[int, ...]
    mixing: Mixing
    parts: tuple[tuple[Mapping[str, nn.Module], tuple[int, ...]], ...]
    is_routed: bool = False


def _bind(
    signature: inspect.Signature, model: nn.Module, mixture: MixedSamples, args: tuple, kwargs: dict[str, Any]
) -> tuple[inspect.BoundArguments, str]:
    """Return the arguments of a model's call with a mixed batch, and the name of the one that holds the images.

    Raises:
        ValueError: The call computes a loss, or the batch has another number of images or of data samples.
    """
    bound = signature.bind(model, *args, **kwargs)
    bound.apply_defaults()
    given = list(bound.arguments)[1]  # after the model itself
    if bound.arguments.get('mode') == 'loss':
        raise ValueError('mixed() is for prediction and computes no loss: train one adapter at a time')
    x, samples = bound.arguments[given], bound.arguments.get('data_samples')
    mixture.check(model, x)
    if samples is not None and len(samples) != len(x):
        raise ValueError(f'{len(samples)} data samples were given for {len(x)} images')
    return bound, given


def _unequal(sizes: set[tuple[int, ...]]) -> str:
    return (
        f'samples of a mixed batch must have one size, got {", ".join(map(str, sorted(sizes)))}; put samples of one '
        'size into a batch, or predict them one by one (batch_size=1)'
    )


class BackboneRouter(Replacement):
    """Runs a backbone on a mixed batch, with the samples in the order of their adapters.

    Args:
        backbone: The backbone.
        switch: Its switch.

    Attributes:
        checked: Names of places where rows are known to lie in the order of samples.
    """

    def __init__(self, backbone: nn.Module, switch: Switch) -> None:
        super().__init__(backbone)
        self.switch = switch
        self.checked: set[str] = set()
        self.replace()

    @left_to_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone."""
        mixture = self.switch.override
        if not isinstance(mixture, Mixture):
            return self.host_forward(*args, **kwargs)
        args, kwargs = self.input_first(args, kwargs)
        x = args[0] if args else None
        mixture.check(self.module, x)
        if any(isinstance(value, Tensor) for value in (*args[1:], *kwargs.values())):
            raise ValueError(
                f'{type(self.module).__name__} takes other tensors beside the images; mixed() does not know which '
                'samples they belong to'
            )
        if mixture.parts and not mixture.is_routed:
            raise ValueError(
                'the adapters have necks and heads of their own, so within mixed() call the model itself, such as '
                "model.test_step(data) or model(inputs, data_samples, mode='predict'). For features, use "
                'mixed(model.backbone, ...)'
            )
        assert isinstance(x, Tensor)
        self._probe(mixture.mixing, x, args[1:], kwargs)
        order = torch.tensor(mixture.order, device=x.device)
        is_sorted = mixture.order == tuple(range(len(x)))
        with self.switch.overridden(mixture.mixing):
            outputs = self.host_forward(x if is_sorted else x[order], *args[1:], **kwargs)
        for tensor in _tensors(outputs):
            if len(tensor) != len(x):
                raise ValueError(
                    f'{type(self.module).__name__} returned {len(tensor)} rows for a batch of {len(x)}, so it is not '
                    'known which sample they belong to, and mixed() cannot be used'
                )
        if is_sorted:
            return outputs
        back = order.argsort()
        return tree_map(lambda t: t[back] if isinstance(t, Tensor) else t, outputs)

    def _probe(self, mixing: Mixing, x: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        """Make sure once that the backbone keeps the order of samples, wherever adapters act.

        Raises:
            ValueError: It does not.
        """
        if mixing.places <= self.checked:
            return
        probe = RowProbe(mixing.blocks)
        sample = torch.linspace(-1, 1, x[0].numel(), device=x.device).to(x.dtype).view_as(x[0])
        with self.switch.overridden(probe):
            outputs = self.host_forward(torch.stack((sample, torch.full_like(sample, torch.nan))), *args, **kwargs)
        for tensor in _tensors(outputs):
            probe.look('its output', tensor)
        if probe.wrong:
            raise ValueError(
                f'{type(self.module).__name__} mixes up the samples of a batch ({probe.wrong[0]}), so it is not known '
                'which adapter a row belongs to; predict with one adapter at a time'
            )
        self.checked.update(mixing.places)


@dataclass(frozen=True)
class Alone(Override):
    """One of the adapters, in the place of the active one.

    Attributes:
        name: The adapter; None for the base.
    """

    name: str | None

    def run(self, joint: Joint, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the module of a joint with the adapter."""
        attachment = None if self.name is None else joint.attachments.get(self.name)
        if attachment is None:
            return super().run(joint, args, kwargs)
        args, kwargs = joint.input_first(args, kwargs)
        return attachment.forward(*args, **kwargs)


@dataclass(frozen=True)
class Turns(MixedSamples):
    """A mixed batch for a model with several adapted modules, whose adapters take turns.

    Attributes:
        groups: Of each adapter its name, its necks and heads by their paths in the model, and the numbers of its
            samples.
    """

    groups: tuple[tuple[str | None, Mapping[str, nn.Module], tuple[int, ...]], ...]


class TurnsRouter(Replacement):
    """Runs a model once for each adapter of a mixed batch, on the adapter's samples.

    Args:
        model: The model.
        switch: Its switch.
    """

    def __init__(self, model: nn.Module, switch: Switch) -> None:
        super().__init__(model)
        self.switch = switch
        self._signature = inspect.signature(type(model).forward)
        self.replace()

    @left_to_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        turns = self.switch.override
        if not isinstance(turns, Turns):
            return self.host_forward(*args, **kwargs)
        bound, given = _bind(self._signature, self.module, turns, args, kwargs)
        x, samples = bound.arguments[given], bound.arguments.get('data_samples')
        outputs = []
        for name, parts, numbers in turns.groups:
            own = inspect.BoundArguments(bound.signature, OrderedDict(bound.arguments))
            own.arguments[given] = x[list(numbers)]
            if samples is not None:
                own.arguments['data_samples'] = [samples[number] for number in numbers]
            with self.switch.overridden(Alone(name)):
                outputs.append(with_values(self.module, parts).forward(*own.args[1:], **own.kwargs))
        return _join(outputs, [numbers for *_, numbers in turns.groups], len(x))


class ClassifierRouter(Replacement):
    """Runs a classifier within a backbone on a mixed batch, with that of each adapter.

    Args:
        classifier: The classifier of one of the adapters.
        switch: The switch of the backbone.
    """

    def __init__(self, classifier: nn.Module, switch: Switch) -> None:
        super().__init__(classifier)
        self.switch = switch
        self.replace()

    @left_to_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the classifiers."""
        mixing = self.switch.override
        routes = mixing.classifiers.get(self.module) if isinstance(mixing, Mixing) else None
        if routes is None:
            return self.host_forward(*args, **kwargs)
        args, kwargs = self.input_first(args, kwargs)
        outputs = [(rows, router.host_forward(rows.take(args[0]), *args[1:], **kwargs)) for router, rows in routes]
        shapes = {tuple(out.shape[1:]) for _, out in outputs}
        if len(shapes) > 1:
            raise ValueError(
                f'the classifiers of these adapters lie in the backbone and return {" and ".join(map(str, shapes))} '
                'values, which do not fit one tensor; put adapters with equally many classes into a batch'
            )
        whole = outputs[0][1].new_empty(len(args[0]), *outputs[0][1].shape[1:])
        return put(whole, outputs)


class ModelRouter(Replacement):
    """Runs a model on a mixed batch: the backbone once, then a view of the model for each neck and head.

    Args:
        model: The model.
        switch: The switch of its backbone.
        backbone: Path of the backbone in the model.

    Attributes:
        is_direct: Whether the model calls its backbone once, on the images, as far as known.
    """

    def __init__(self, model: nn.Module, switch: Switch, backbone: str) -> None:
        super().__init__(model)
        self.switch = switch
        self.backbone = backbone
        self.is_direct = True
        self._signature = inspect.signature(type(model).forward)
        self.replace()

    @left_to_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        mixture = self.switch.override
        if not isinstance(mixture, Mixture) or mixture.is_routed or not mixture.parts:
            return self.host_forward(*args, **kwargs)
        bound, given = _bind(self._signature, self.module, mixture, args, kwargs)
        arguments = bound.arguments
        x, samples = arguments[given], arguments.get('data_samples')
        sizes = {tuple(s.metainfo['img_shape'][:2]) for s in samples or () if 'img_shape' in getattr(s, 'metainfo', {})}
        if len(sizes) > 1:
            raise ValueError(_unequal(sizes))
        call = _Call(self.module, self.backbone, mixture.parts, bound, given, x, samples)
        with self.switch.overridden(replace(mixture, is_routed=True)):
            if self.is_direct:
                try:
                    return call.direct()
                except _OtherCall:
                    self.is_direct = False
            return call.recorded()


class _OtherCall(Exception):
    """A model called its backbone otherwise than expected."""


@dataclass
class _Call:
    """One call of a model on a mixed batch.

    Attributes:
        model: The model.
        backbone: Path of the backbone in it.
        parts: Necks and heads by path, each with the numbers of its samples.
        bound: The arguments of the call.
        given: Name of the argument with the images.
        x: The images.
        samples: The data samples, or None.
    """

    model: nn.Module
    backbone: str
    parts: Sequence[tuple[Mapping[str, nn.Module], tuple[int, ...]]]
    bound: inspect.BoundArguments
    given: str
    x: Tensor
    samples: Sequence[Any] | None

    def direct(self) -> Any:
        """Run the backbone on the images, then each neck and head on their features.

        Raises:
            _OtherCall: The model calls its backbone more than once, or not on the images.
        """
        features = self.model.get_submodule(self.backbone)(self.x)
        return self._join(self._replay([(self.x, features)], parts, numbers) for parts, numbers in self.parts)

    def recorded(self) -> Any:
        """Run the model with the first neck and head on all samples. Replay its calls of the backbone for the others.

        Models that slide a window over the images need this. It costs one more run of a head.
        """
        (parts, own), *others = self.parts
        backbone = self.model.get_submodule(self.backbone)
        tape: list[tuple[Any, Any]] = []

        def record(x: Any, *args: Any, **kwargs: Any) -> Any:
            tape.append((x, backbone(x, *args, **kwargs)))
            return tape[-1][1]

        samples = self.samples
        if samples is not None:  # models write predictions into them
            samples = [s if number in own else copy.deepcopy(s) for number, s in enumerate(samples)]
        out = self._run(parts, record, self.x, samples)
        outputs = [[out[number] for number in own] if isinstance(out, list) else _select(out, own)]
        outputs += [self._replay(tape, parts, numbers) for parts, numbers in others]
        return self._join(outputs)

    def _replay(self, tape: Sequence[tuple[Any, Any]], parts: Mapping[str, nn.Module], numbers: tuple[int, ...]) -> Any:
        """Run a neck and a head on features that the backbone has returned."""
        x = self.x[list(numbers)]
        calls = iter(tape)

        def replay(given: Any, *args: Any, **kwargs: Any) -> Any:
            seen, features = next(calls, (None, None))
            expected = x if seen is self.x else seen if seen is None else seen[list(numbers)]
            if given is not expected and not (
                isinstance(given, Tensor)
                and isinstance(expected, Tensor)
                and given.shape == expected.shape
                and torch.equal(given, expected)
            ):
                raise _OtherCall
            return _select(features, numbers)

        samples = None if self.samples is None else [self.samples[number] for number in numbers]
        return self._run(parts, replay, x, samples)

    def _run(self, parts: Mapping[str, nn.Module], backbone: Callable, x: Tensor, samples: Any) -> Any:
        """Run a view of the model that has other parts and another forward of its backbone."""
        bound = inspect.BoundArguments(self.bound.signature, OrderedDict(self.bound.arguments))
        bound.arguments[self.given] = x
        if samples is not None:
            bound.arguments['data_samples'] = samples
        original = self.model.get_submodule(self.backbone)
        view = with_values(self.model, {**parts, self.backbone: with_forward(original, backbone)})
        return view.forward(*bound.args[1:], **bound.kwargs)

    def _join(self, outputs: Iterable[Any]) -> Any:
        return _join(list(outputs), [numbers for _, numbers in self.parts], len(self.x))


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]


def _select(outputs: Any, numbers: Sequence[int]) -> Any:
    """Return the rows of some samples of all tensors of nested outputs."""
    return tree_map(lambda t: t[list(numbers)] if isinstance(t, Tensor) else t, outputs)


def _join(outputs: Sequence[Any], numbers: Sequence[Sequence[int]], batch: int) -> Any:
    """Put the outputs for parts of a batch together, in the order of the batch."""
    if all(isinstance(out, list) and len(out) == len(own) for out, own in zip(outputs, numbers)) and not any(
        _tensors(out) for out in outputs
    ):
        samples = {number: sample for out, own in zip(outputs, numbers) for number, sample in zip(own, out)}
        return [samples[number] for number in range(batch)]
    leaves, structures = zip(*map(tree_flatten, outputs))
    if any(structure != structures[0] for structure in structures):
        raise ValueError(_ragged(outputs))
    joined = []
    for group in zip(*leaves):
        if not isinstance(group[0], Tensor):
            joined.append(group[0])
            continue
        if len({(tensor.shape[1:], tensor.dtype) for tensor in group}) > 1 or any(
            len(tensor) != len(own) for tensor, own in zip(group, numbers)
        ):
            raise ValueError(_ragged(outputs))
        whole = group[0].new_empty(batch, *group[0].shape[1:])
        joined.append(put(whole, [(Rows(tuple(own), batch), tensor) for own, tensor in zip(numbers, group)]))
    return tree_unflatten(joined, structures[0])


def _ragged(outputs: Sequence[Any]) -> str:
    shapes = sorted({str([tuple(t.shape[1:]) for t in _tensors(out)]) for out in outputs})
    return (
        f'the heads of these adapters return tensors of several shapes, {", ".join(shapes)}, which do not fit one '
        "tensor; ask for predictions (mode='predict'), or put adapters of one number of classes into a batch"
    )
