"""Modules that run with weights computed from their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from iconformer_mm.adapters import WeightAdapter

from ..quantised_weight import stored_parameter
from ..replacement import parameter_of, with_values
from .base import Attachment, WeightMergingAttachment


class WeightAttachment(WeightMergingAttachment, Attachment):
    """Runs a module with weights computed from its own, and leaves its own unchanged (ours).

    So methods that tune some of the host's parameters behave like adapters. The base does
    not change. The trained tensors can be saved, switched and removed. The result can be
    merged into the base. Each call runs a view of the module, see
    :func:`~iconformer_mm.tuning.replacement.with_values`.

    Args:
        name: Name of the module in the backbone.
        module: The module, a block or a leaf.
        kind: Kind of the module, for display.
        adapter: Computes the weights, by their names in the module.
    """

    def __init__(self, name: str, module: nn.Module, kind: str, adapter: WeightAdapter) -> None:
        super().__init__(name, module, kind, {'adapter': adapter})
        self.weight_names = adapter.names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with the computed weights."""
        return self.joint.run(self._run, *args, **kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        made = self.part('adapter')({name: parameter_of(self.module, name) for name in self.weight_names})
        view = with_values(self.module, made)
        return view.forward(*args, **kwargs)

    @torch.no_grad()
    def merged_weights(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Return the parameter and the merged value of each weight."""
        return merged_weights(self.module, self.adapters['adapter'], self.weight_names)


def merged_weights(module: nn.Module, adapter: Any, names: tuple[str, ...]) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """Return parameters of a module by name, each with the value that a weight adapter computes for it."""
    weights = {name: parameter_of(module, name) for name in names}
    made = adapter({name: weight.detach() for name, weight in weights.items()})
    return {name: (stored_parameter(module, name), made[name]) for name in names}
