"""Base values of parameters that are trained in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .freezing import is_adapter


class TrainedBase:
    """Remembers the values of a backbone's own parameters before training (ours).

    They are the values at the injection, or later base weights that are loaded or set before the first backward
    pass. Weights of a trained model, which contain adapters, do not become base values.

    Args:
        backbone: The backbone.
        names: Names of the parameters and statistics that are trained in place.
    """

    def __init__(self, backbone: nn.Module, names: list[str]) -> None:
        self.backbone = backbone
        self.names = names
        self.known = True
        self._values: dict[str, Tensor] = {}
        self._begun = False
        self._loads_trained = self._loads_base = False
        self.remember()
        self._watch_gradients()
        self._handles: list[Any] = [
            backbone._register_load_state_dict_pre_hook(self._before_load),
            backbone.register_load_state_dict_post_hook(self._after_load),
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained tensors by name."""
        state = self.backbone.state_dict()
        return {name: state[name] for name in self.names}

    def base_values(self) -> dict[str, Tensor]:
        """Return copies of the base values by name."""
        return {name: value.clone() for name, value in self._values.items()}

    def trained_values(self) -> dict[str, Tensor]:
        """Return copies of the current values by name."""
        return {name: value.detach().clone() for name, value in self.tensors().items()}

    def remember(self) -> None:
        """Store the current values as base values, unless training has begun."""
        if not self._begun:
            self._values = {name: value.detach().clone() for name, value in self.tensors().items()}

    def begin(self) -> None:
        """Store the current values as base values, and mark training as begun."""
        self.remember()
        self._begun = True

    def _watch_gradients(self) -> None:
        parameters = dict(self.backbone.named_parameters())
        self._gradient_handles = [
            parameters[name].register_hook(self._see_gradient)
            for name in self.names
            if name in parameters and parameters[name].requires_grad
        ]

    def _see_gradient(self, gradient: Tensor) -> None:
        self.begin()
        for handle in self._gradient_handles:
            handle.remove()
        self._gradient_handles = []

    def _before_load(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        own = {name[len(prefix) :]: v for name, v in state_dict.items() if name.startswith(prefix)}
        self._loads_trained = any(map(is_adapter, own))
        self._loads_base = not self._loads_trained and any(name in own for name in self.names)
        if not self._loads_trained:
            return
        if not self._begun:
            # The file of a whole trained model lacks the base values of these tensors. Those in memory
            # apply only if the file has the same base.
            held = {n: v for n, v in self.backbone.state_dict().items() if not is_adapter(n) and n not in self.names}
            self.known = all(
                v.is_meta or (v.shape == own[n].shape and torch.equal(v.cpu(), own[n].cpu().to(v.dtype)))
                for n, v in held.items()
                if n in own
            )
        self.begin()

    def _after_load(self, backbone: nn.Module, incompatible_keys: Any) -> None:
        if self._loads_base:
            self.renew()

    def renew(self) -> None:
        """Take the current values for base values that were just loaded."""
        self._begun, self.known = False, True
        self.remember()
        for handle in self._gradient_handles:
            handle.remove()
        self._watch_gradients()

    def check(self) -> None:
        """Reject restoring base values that are unknown.

        Raises:
            ValueError: A trained model was loaded over another base.
        """
        if not self.known:
            raise ValueError(
                f'the base values of {self.names[0]} and others are unknown: the file that was loaded contains trained '
                'values and another base than the model had. Build the model again with the weights of the base, or '
                'merge the adapter if its method supports it'
            )

    def restore(self) -> None:
        """Restore the base values of the parameters."""
        set_values(self.backbone, self._values)

    def release(self) -> None:
        """Stop watching."""
        for handle in (*self._handles, *self._gradient_handles):
            handle.remove()
        self._gradient_handles = []

    def __getstate__(self) -> dict[str, Any]:
        # Copies of parameters have no hooks, so the base values of a copy are the current ones.
        self.remember()
        return {**vars(self), '_gradient_handles': []}


@torch.no_grad()
def set_values(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into tensors of a module, by their names in its state dict."""
    state = module.state_dict()
    for name, value in values.items():
        state[name].copy_(value)
