"""Weights of a host that stand for others while it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iconformer_mm.adapters import WeightAdapter

from .attachment import Attachment


class _Swap:
    """Within it a module has other tensors for some of its parameters."""

    def __init__(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        self.places = [(*_owner(module, name), value) for name, value in values.items()]

    def __enter__(self) -> None:
        self.originals = [owner._parameters[name] for owner, name, _ in self.places]
        for owner, name, value in self.places:
            owner._parameters[name] = value

    def __exit__(self, *error: object) -> None:
        for (owner, name, _), original in zip(self.places, self.originals):
            owner._parameters[name] = original


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition('.')
    return module.get_submodule(path), last


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

    def _weights(self) -> dict[str, Tensor]:
        adapter = self.adapters['adapter']
        return adapter({name: self.module.get_parameter(name) for name in adapter.names})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward with the other weights."""
        return self._run(self._forward, *args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Swap(self.module, self._weights()):
            return self._host_forward(*args, **kwargs)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the weights into the module's parameters."""
        for name, value in self._weights().items():
            self.module.get_parameter(name).copy_(value)
