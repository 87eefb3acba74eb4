"""Keeping the values of adapters while their host initialises its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .backbones import is_below
from .freezing import is_adapter


class KeptInitialisation:
    """Replaces ``init_weights`` of a model, so that adapters keep their values.

    Detectors of the DETR family draw every matrix in their encoder and decoder anew, adapters included. They do so
    after the injection, when a run begins. An adapter that starts at zero would no longer do so.

    Args:
        model: The model. Nothing happens if it has no ``init_weights``.
        parts: Name of the module in it whose adapters are not kept.
    """

    def __init__(self, model: nn.Module, parts: str) -> None:
        self.model: Any = model
        self.parts = parts
        self._replaced = model.__dict__.get('init_weights')
        self._is_active = callable(getattr(model, 'init_weights', None))
        if self._is_active:
            self.model.__dict__['init_weights'] = self.init_weights

    @torch.no_grad()
    def init_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own ``init_weights``, and restore the adapters."""
        names = (n for n, _ in self.model.named_parameters() if is_adapter(n) and not is_below(n, [self.parts]))
        kept = {name: self.model.get_parameter(name).clone() for name in names}
        with torch.enable_grad():
            if self._replaced is None:
                out = type(self.model).init_weights(self.model, *args, **kwargs)
            else:
                out = self._replaced(*args, **kwargs)
        for name, value in kept.items():
            self.model.get_parameter(name).copy_(value)
        return out

    def release(self) -> None:
        """Restore ``init_weights``."""
        if not self._is_active:
            return
        if self._replaced is None:
            del self.model.init_weights
        else:
            self.model.__dict__['init_weights'] = self._replaced
