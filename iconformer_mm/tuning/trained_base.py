"""The base values of parameters that are trained in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .freezing import is_adapter


class TrainedBase:
    """Remembers what a backbone's own parameters were before they were trained (ours).

    The values are those at the injection, or of base weights that were loaded or set since, up to the first
    backward pass. Weights of a trained model, which have adapters in them, do not become base values.

    Args:
        backbone: The backbone.
        names: Names of its parameters and statistics that are trained in place.
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
        """What is trained, by name."""
        state = self.backbone.state_dict()
        return {name: state[name] for name in self.names}

    def base_values(self) -> dict[str, Tensor]:
        """A copy of the base values, by name."""
        return {name: value.clone() for name, value in self._values.items()}

    def trained_values(self) -> dict[str, Tensor]:
        """A copy of the present values, by name."""
        return {name: value.detach().clone() for name, value in self.tensors().items()}

    def remember(self) -> None:
        """Take the present values for those of the base, unless training has begun."""
        if not self._begun:
            self._values = {name: value.detach().clone() for name, value in self.tensors().items()}

    def begin(self) -> None:
        """Take the present values for those of the base; from now on they are trained ones."""
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
            # A whole model's file is of a base whose values of these it does not have.
            held = {n: v for n, v in self.backbone.state_dict().items() if not is_adapter(n) and n not in self.names}
            self.known = all(
                v.is_meta or (v.shape == own[n].shape and torch.equal(v.cpu(), own[n].cpu().to(v.dtype)))
                for n, v in held.items()
                if n in own
            )
        self.begin()

    def _after_load(self, backbone: nn.Module, incompatible_keys: Any) -> None:
        if self._loads_base:
            self._begun, self.known = False, True
            self.remember()
            if not self._gradient_handles:
                self._watch_gradients()

    def check(self) -> None:
        """Refuse to give back what is not known.

        Raises:
            ValueError: A trained model was loaded over another base.
        """
        if not self.known:
            raise ValueError(
                f'the base values of {self.names[0]} and others are unknown: a file was loaded that has them as they '
                'were trained, with another base than was there. Make the model anew with the weights of the base, or '
                'merge the adapter, if its method can be'
            )

    def restore(self) -> None:
        """Give the parameters their base values back."""
        set_values(self.backbone, self._values)

    def release(self) -> None:
        """Stop watching."""
        for handle in (*self._handles, *self._gradient_handles):
            handle.remove()
        self._gradient_handles = []

    def __getstate__(self) -> dict[str, Any]:
        # Copies of parameters have no hooks, so a copy's base values are the present ones.
        self.remember()
        return {**vars(self), '_gradient_handles': []}


@torch.no_grad()
def set_values(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy values into tensors of a module, by their names in its state dict."""
    state = module.state_dict()
    for name, value in values.items():
        state[name].copy_(value)
