"""What is frozen in a backbone and beside it, and keeping it so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ADAPTER = 'adapter'
_PLACE = re.compile(r'(^|\.)adapter(_attention|_parts)?(__[^.]*)?(\.|$)')


def is_adapter(name: str) -> bool:
    """Whether a name in a backbone is that of an adapter or of something in it (names of its own never are)."""
    return _PLACE.search(name) is not None


def _is_below(name: str, prefixes: Iterable[str]) -> bool:
    return any(name.startswith(f'{prefix}.') for prefix in prefixes)


class Freezing:
    """Holds the pre-trained parameters of a backbone, and trains its adapters.

    That is set once; what the caller sets later, stays. Backbones have ``train()`` methods of their own that
    switch gradients off by ``frozen_stages``, adapters within included, and BatchNorm back on to batch statistics.
    So each ``train()`` leaves every ``requires_grad`` as it was. Adapters take the mode that was asked for.
    BatchNorm keeps to its stored statistics until the caller puts it into training mode itself.

    Args:
        backbone: The adapted backbone.
        trained: Names of its own parameters that are trained, and of the statistics that go with them.
        outside: Names of its submodules that are heads, and left alone.
        trains: Whether anything in it is trained. False for what follows another.
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
        # Those whose statistics are held; a caller takes one out by train() of the module itself.
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
        """``backbone.train``, with the freezing kept."""
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
        """Give ``train`` and every ``requires_grad`` back as they were."""
        if self._replaced is None:
            del self.backbone.train
        else:
            self.backbone.__dict__['train'] = self._replaced
        for name, parameter in self.backbone.named_parameters():
            if name in self._requires_grad:
                parameter.requires_grad_(self._requires_grad[name])
        self.backbone.train(self.backbone.training)


class _HeldStatistics:
    """Stands in for ``train`` of a BatchNorm, which keeps to its stored statistics."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.training
        module.__dict__['train'] = self.train
        self.train(module.training)

    def train(self, mode: bool = True) -> nn.Module:
        """Remember the mode that was asked for."""
        self.before = mode
        self.module.training = False
        return self.module

    def release(self) -> None:
        """Give ``train`` and the mode back."""
        del self.module.train
        self.module.training = self.before


class FrozenParts:
    """What stands beside the backbones of a model and is frozen; kept on the model, so that it can be undone.

    Args:
        model: The model.
        names: Names of its parameters that are frozen.
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
        """Give every ``requires_grad`` back as it was, and BatchNorm its ``train``."""
        parameters = dict(self.model.named_parameters())
        for name, value in self._requires_grad.items():
            if name in parameters:
                parameters[name].requires_grad_(value)
        for held in self._held:
            held.release()
        delattr(self.model, self.KEY)
