"""One batch in which each sample goes through an adapter of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from iconformer_mm.adapters import DoRAAdapter

from .attachments import LowRankAttachment
from .attachments.mixed import Mixing, Rows, mix, why_not_mixed
from .backbones import join, unwrap
from .calls import PerThread
from .injection import Injection, NamedAdapter, backbones_of, merged_adapter
from .quantised_weight import stored_parameter
from .routing import BackboneRouter, ClassifierRouter, MixedSamples, Mixture, ModelRouter, Turns, TurnsRouter
from .switching import require

_Parts = Mapping[str, nn.Module]
_Router = BackboneRouter | ClassifierRouter | ModelRouter | TurnsRouter
_installing = threading.Lock()


class MixedBatch:
    """A plan of which sample of a batch goes through which adapter. Made by :func:`mixed`.

    It is a context manager that can be entered any number of times, in any number of threads. Only the thread that
    entered it is affected. The weights of adapters of one shape are stacked once, when the plan is made. The plan
    holds the stacks.

    Attributes:
        adapters: Name of the adapter of each sample, None for a sample without an adapter.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[str | None]) -> None:
        self._injection, self._named = check_mixable(model, adapters)
        self.adapters = tuple(adapters)
        model = unwrap(model)
        self._mixture: MixedSamples
        self._weights: list = []
        self._entered = PerThread()
        if len(self._injection.backbones) > 1:
            self._mixture = Turns(self.adapters, self._turns())
            self._router(model, TurnsRouter)
            return
        tensors = [tensor for adapter in self._named.values() for tensor in _stacked_tensors(adapter)]
        self._weights = [(tensor, _mark(tensor)) for tensor in tensors]
        order = _order(self.adapters, self._named)
        samples: dict[str, list[int]] = {}
        for place, number in enumerate(order):
            name = self.adapters[number]
            if name is not None:
                samples.setdefault(name, []).append(place)
        with torch.no_grad():
            mixed_blocks = {joint: mix(joint, samples, len(order)) for joint in self._injection.joints.values()}
        blocks = {joint: block for joint, block in mixed_blocks.items() if block is not None}
        within, beside = self._parts(model)
        self._mixture = Mixture(
            self.adapters, tuple(order), Mixing(blocks, self._classifiers(within, order)), tuple(beside)
        )
        for backbone in self._injection.backbones.values():
            self._router(backbone, BackboneRouter)
        if beside:
            self._router(model, ModelRouter, next(iter(backbones_of(model))))

    def _turns(self) -> tuple[tuple[str | None, _Parts, tuple[int, ...]], ...]:
        """Return each adapter with its necks and heads, and the numbers of its samples."""
        current = self._injection.current.parts if self._injection.current else None
        numbers: dict[str | None, list[int]] = {}
        for number, name in enumerate(self.adapters):
            numbers.setdefault(name, []).append(number)
        return tuple(
            (name, (current if name is None else self._named[name].parts) or {}, tuple(own))
            for name, own in numbers.items()
        )

    def _router(self, module: nn.Module, router: Callable[..., _Router], *args: Any) -> Any:
        """Return the router of a module. The first plan puts it there, and it stays for all others."""
        routers = self._injection.routers
        with _installing:
            if module not in routers:
                routers[module] = router(module, self._injection.switch, *args)
            return routers[module]

    def _parts(self, model: nn.Module) -> tuple[dict[str, list[tuple[nn.Module, list[int]]]], list]:
        """Return necks and heads with the numbers of their samples: those within backbones by path, and the others."""
        injection = self._injection
        current = injection.current.parts if injection.current else None
        inside = {join(path, name) for path, names in injection.outside.items() for name in names}
        is_backbone = any(model is backbone for backbone in injection.backbones.values())
        within: dict[str, list[tuple[nn.Module, list[int]]]] = {}
        beside: list[tuple[_Parts, tuple[int, ...]]] = []
        by_parts: dict[tuple[int, ...], tuple[_Parts, list[int]]] = {}
        for number, name in enumerate(self.adapters):
            parts = (self._named[name].parts if name is not None else current) or {}
            key = tuple(map(id, parts.values()))
            by_parts.setdefault(key, (parts, []))[1].append(number)
        for each, numbers in by_parts.values():
            for path, module in each.items():
                if path in inside:
                    within.setdefault(path, []).append((module, numbers))
            if not is_backbone:
                others = {path: module for path, module in each.items() if path not in inside}
                beside.append((others, tuple(numbers)))
        return within, beside if any(parts for parts, _ in beside) else []

    def _classifiers(
        self, within: Mapping[str, Sequence[tuple[nn.Module, list[int]]]], order: Sequence[int]
    ) -> dict[nn.Module, list[tuple[Any, Rows]]]:
        """Return what runs in the place of classifiers within backbones."""
        places = {number: place for place, number in enumerate(order)}
        classifiers: dict[nn.Module, list[tuple[Any, Rows]]] = {}
        for modules in within.values():
            routes = []
            for module, numbers in modules:
                rows = Rows(tuple(sorted(places[number] for number in numbers)), len(order))
                routes.append((self._router(module, ClassifierRouter), rows))
            classifiers.update((module, routes) for module, _ in modules)
        return classifiers

    def _check_current(self) -> None:
        """Refuse a plan whose adapters are no longer what they were.

        Raises:
            ValueError: An adapter was deleted, its weights were changed, or it is in training mode.
        """
        for name, adapter in self._named.items():
            if self._injection.adapters.get(name) is not adapter:
                raise ValueError(
                    f"the adapter '{name}' was deleted or replaced after mixed() was called; call it again"
                )
            modules = [module for _, module in adapter.modules()] + list((adapter.parts or {}).values())
            if any(module.training for module in modules):
                raise ValueError(
                    f"the adapter '{name}' or its head is in training mode, and mixed() is for prediction: call "
                    'model.eval() first'
                )
        if any(_mark(tensor) != mark for tensor, mark in self._weights):
            raise ValueError('weights of the adapters were changed after mixed(); call it again')

    def __enter__(self) -> MixedBatch:
        self._check_current()
        stack = ExitStack()
        stack.enter_context(torch.no_grad())
        stack.enter_context(self._injection.switch.overridden(self._mixture))
        self._entered.value = [*(self._entered.value or ()), stack]
        return self

    def __exit__(self, *error: Any) -> None:
        *self._entered.value, stack = self._entered.value
        stack.close()


def mixed(model: nn.Module, adapters: Sequence[str | None]) -> MixedBatch:
    """Let each sample of a batch go through its own adapter, neck and head within the context (ours).

    The base runs once over the whole batch; a model with several adapted modules (``where``) runs once for each
    adapter. Adapters of one shape run as one batched product. The results are those
    of one adapter at a time, up to rounding. Methods may be mixed. It is for prediction: within the context no
    gradients are recorded, and a model in training mode is refused.

    Args:
        model: An adapted model in evaluation mode, or its backbone. Call what was given here: a model's
            ``test_step(data)`` or ``model(inputs, data_samples, mode='predict')`` returns the predictions in the
            order of the samples. A backbone returns the features in that order.
        adapters: Name of the adapter of each sample of the batch, in order. None is a sample without an adapter. It
            goes through the base, and the neck and head of the active adapter.

    Returns:
        The plan, a context manager. Keep it to run several batches of the same adapters.

    Raises:
        ValueError: The model is not adapted, merged or wrapped, it lacks an adapter, ``adapters`` is empty or not a
            list of names, or the method of an adapter cannot be mixed. Entering a plan raises it, if an adapter was
            deleted, is in training mode, or its weights were changed since the plan was made. A call within the context
            raises it, if the batch has another number of samples, samples differ in size, the model is in training
            mode or asked for a loss, or it mixes up the samples of a batch.

    Example:
        >>> with mixed(model, ['birds', 'cars', 'birds', None]):
        ...     predictions = model.test_step(data)  # of four images
    """
    return MixedBatch(model, adapters)


def check_mixable(model: nn.Module, adapters: Sequence[str | None]) -> tuple[Injection, dict[str, NamedAdapter]]:
    """Check that samples can go through adapters of a model in one batch, see :func:`mixed`.

    Returns:
        What was injected into the model, and the adapters by name.

    Raises:
        ValueError: The model is not adapted, merged or wrapped, it lacks an adapter, ``adapters`` is empty or not a
            list of names, or the method of an adapter cannot be mixed.
    """
    if isinstance(adapters, str) or not isinstance(adapters, Sequence) or not adapters:
        raise ValueError(f'adapters must be a list with one name, or None, for each sample, got {adapters!r}')
    for name in adapters:
        if not (name is None or isinstance(name, str)):
            raise ValueError(f'adapters must be a list with one name, or None, for each sample, got {name!r} in it')
    merged = merged_adapter(model)
    if merged is not None:
        raise ValueError(
            f"the adapter '{merged}' was merged into the base weights, which all samples of a batch share; call "
            'unmerge(model) first'
        )
    injection, named = require(model), {}
    for name in dict.fromkeys(adapters):
        if name is None:
            injection.check_unchanged('a sample without an adapter')
        else:
            named[name] = require(model, name).adapters[name]
            if len(injection.backbones) == 1:
                _check_method(name, named[name])
    return injection, named


def _check_method(name: str, adapter: NamedAdapter) -> None:
    """Refuse an adapter that cannot run on some samples of a batch.

    Raises:
        ValueError: It cannot.
    """
    method = adapter.method
    reasons = [reason for reason in map(why_not_mixed, adapter.attachments) if reason]
    if not method.freezes:
        reasons = ['it trains the base itself, which all samples of a batch share']
    if reasons:
        raise ValueError(
            f"the adapter '{name}' cannot be mixed with others in one batch: method '{method.name}': {reasons[0]}. "
            'Predict with one adapter at a time (set_adapter)'
        )


def _stacked_tensors(adapter: NamedAdapter) -> list[Tensor]:
    """Return the tensors that a plan makes copies of, or computes something of."""
    own = [tensor for _, module in adapter.modules() for tensor in (*module.parameters(), *module.buffers())]
    for attachment in adapter.attachments:
        if isinstance(attachment, LowRankAttachment) and isinstance(attachment.part('adapter'), DoRAAdapter):
            # Its factors depend on the weights of the base.
            own += [stored_parameter(attachment.module, name) for name in attachment.weight_names]
    return own


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Return what changes when the values of a tensor are replaced or changed in place."""
    plain = type(tensor) in (Tensor, nn.Parameter)  # others need not have memory of their own
    return tensor.data_ptr() if plain else id(tensor), 0 if tensor.is_inference() else tensor._version


def _order(adapters: Sequence[str | None], named: Mapping[str, NamedAdapter]) -> list[int]:
    """Return the numbers of the samples so that those which can run as one product are neighbours.

    These are samples of methods with the same config, then of adapters with the same number of samples, then of one
    adapter.
    """
    names = list(dict.fromkeys(adapters))

    def key(number: int) -> tuple:
        name = adapters[number]
        if name is None:
            return ('', '', 0, 0)
        adapter = named[name]
        return (repr(adapter.method.config), repr(adapter.selection.blocks), adapters.count(name), names.index(name))

    return sorted(range(len(adapters)), key=key)
