"""Weights of a host that stand for others while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iconformer_mm.adapters import WeightAdapter

from .attachment import Attachment


class _Place:
    """Where a module keeps one of its weights."""

    def __init__(self, module: nn.Module, name: str) -> None:
        path, _, self.name = name.rpartition('.')
        owner = module.get_submodule(path)
        # FSDP has plain tensors in the place of parameters while it runs.
        self.store: dict[str, Any] = owner.__dict__ if self.name in owner.__dict__ else owner._parameters

    @property
    def value(self) -> Tensor:
        """The weight."""
        return self.store[self.name]

    @value.setter
    def value(self, value: Tensor) -> None:
        self.store[self.name] = value


class WeightAttachment(Attachment):
    """Runs a module with weights made from its own, which stay as they are (ours).

    So methods that tune some of the host's parameters keep what holds for
    adapters: the base is not changed, the trained tensors can be saved, switched
    and removed, and the result can be merged into the base.

    Args:
        name: Name of the module in the backbone.
        module: The module, a block or a leaf.
        kind: What kind of module it is, for people.
        adapter: Makes the weights, by their names in the module.
    """

    def __init__(self, name: str, module: nn.Module, kind: str, adapter: WeightAdapter) -> None:
        super().__init__(name, module, kind, {'adapter': adapter})
        self.adapter = adapter

    def _places(self) -> dict[str, _Place]:
        return {name: _Place(self.module, name) for name in self.adapter.names}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward with the other weights."""
        return self._run(self._forward, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        places = self._places()
        originals = {name: place.value for name, place in places.items()}
        made = self.adapter(originals)
        try:
            for name, place in places.items():
                place.value = made[name]
            return self.host_forward(*args, **kwargs)
        finally:
            for name, place in places.items():
                place.value = originals[name]

    @torch.no_grad()
    def merge(self) -> None:
        """Write the weights into the module's parameters."""
        originals = {name: place.value for name, place in self._places().items()}
        for name, value in self.adapter(originals).items():
            originals[name].copy_(value)
