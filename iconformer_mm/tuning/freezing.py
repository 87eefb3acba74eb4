"""Freezing of parameters in a backbone and outside of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ADAPTER = 'adapter'
_PLACE = re.compile(r'(^|\.)adapter(_attention|_parts)?(__[^.]*)?(\.|$)')


def is_adapter(name: str) -> bool:
    """Whether a name in a backbone belongs to an adapter. The backbone's own names never match."""
    return _PLACE.search(name) is not None


def _is_below(name: str, prefixes: Iterable[str]) -> bool:
    return any(name.startswith(f'{prefix}.') for prefix in prefixes)


class Freezing:
    """Freezes the pre-trained parameters of a backbone, and trains its adapters.

    ``requires_grad`` is set once, and later changes by the caller persist. The ``train()`` methods of some
    backbones switch off the gradients in ``frozen_stages``, adapters included. They also switch BatchNorm back
    to batch statistics. So this class replaces ``train()``. The replacement leaves every ``requires_grad``
    unchanged and sets adapters to the requested mode. BatchNorm uses its stored statistics until the caller
    sets that module itself to training mode.

    Args:
        backbone: The adapted backbone.
        trained: Names of the backbone's own parameters that are trained, and of their statistics. Defaults to none.
        outside: Names of submodules that are heads and stay unchanged. Defaults to none.
        trains: Whether anything in the backbone is trained. False for a copy that follows another module.
            Defaults to True.
    """

    def __init__(
        self,
        backbone: nn.Module,
        trained: Sequence[str] = (),
        outside: Sequence[str] = (),
        trains: bool = True,
    ) -> None:
        self.backbone = backbone
        self.outside = tuple(outside)
        own = {n: p for n, p in backbone.named_parameters() if not is_adapter(n) and not _is_below(n, outside)}
        self._requires_grad = {n: p.requires_grad for n, p in own.items()}
        self._replaced = backbone.__dict__.get('train')
        self._host_train = backbone.train
        for name, parameter in backbone.named_parameters():
            if is_adapter(name) or name in own:
                is_trained = parameter.requires_grad if is_adapter(name) else name in trained
                parameter.requires_grad_(trains and is_trained)
        # BatchNorms whose statistics are frozen. The caller releases one with train() of the module itself.
        statistics = {n.rpartition('.')[0] for n in trained if n not in own}
        self._held = {
            n
            for n, m in backbone.named_modules()
            if isinstance(m, _BatchNorm)
            and n not in statistics
            and not is_adapter(n)
            and not _is_below(f'{n}.', outside)
        }
        self._before: set[str] = set()
        backbone.__dict__['train'] = self.train
        self.train(backbone.training)

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode as ``backbone.train`` does, and keep the freezing."""
        modules = dict(self.backbone.named_modules())
        self._held -= {n for n in self._before if n in modules and modules[n].training}
        before = {n: p.requires_grad for n, p in self.backbone.named_parameters()}
        self._host_train(mode)
        for name, parameter in self.backbone.named_parameters():
            if before.get(name, parameter.requires_grad) != parameter.requires_grad:
                parameter.requires_grad_(before[name])
        for name, module in modules.items():
            if is_adapter(name):
                module.training = mode
            elif name in self._held:
                module.training = False
        self._before = set(self._held)
        return self.backbone

    def release(self) -> None:
        """Restore ``train`` and every ``requires_grad``."""
        if self._replaced is None:
            del self.backbone.train
        else:
            self.backbone.__dict__['train'] = self._replaced
        for name, parameter in self.backbone.named_parameters():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        self.backbone.train(self.backbone.training)


class _HeldStatistics:
    """Replaces ``train`` of a BatchNorm that must use its stored statistics."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.training
        module.__dict__['train'] = self.train
        self.train(module.training)

    def train(self, mode: bool = True) -> nn.Module:
        """Remember the requested mode."""
        self.before = mode
        self.module.training = False
        return self.module

    def release(self) -> None:
        """Restore ``train`` and the mode."""
        del self.module.train
        self.module.training = self.before


class FrozenParts:
    """Frozen parameters outside a model's backbones. It is stored on the model, so that it can be undone.

    Args:
        model: The model.
        names: Names of the parameters to freeze.
    """

    KEY = '_peft_frozen_parts'

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = model
        parameters = dict(model.named_parameters())
        self.names = list(names)
        self._requires_grad = {name: parameters[name].requires_grad for name in names}
        for name in names:
            parameters[name].requires_grad_(False)
        frozen = {id(parameters[name]) for name in names}
        self._held = [
            _HeldStatistics(module)
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            and any(True for _ in module.parameters())
            and all(id(p) in frozen for p in module.parameters())
        ]
        vars(model)[self.KEY] = self

    def release(self) -> None:
        """Restore every ``requires_grad``, and ``train`` of every BatchNorm."""
        parameters = dict(self.model.named_parameters())
        for name, value in self._requires_grad.items():
            if name in parameters:
                parameters[name].requires_grad_(value)
        for held in self._held:
            held.release()
        delattr(self.model, self.KEY)
