"""Frozen weights in half precision, which halves their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from iconformer_mm.compat import device_of, is_autocast_enabled

from .backbones import is_below
from .freezing import is_adapter
from .replacement import Replacement

DTYPES = {'bfloat16': torch.bfloat16}


def check_frozen_dtype(name: str) -> torch.dtype:
    """Return the dtype with a name.

    Raises:
        ValueError: Frozen weights cannot be stored in this dtype.
    """
    if name not in DTYPES:
        raise ValueError(f'frozen_dtype must be None or one of {", ".join(map(repr, DTYPES))}, got {name!r}')
    return DTYPES[name]


class FrozenPrecision(Replacement):
    """Stores the frozen matrices of a backbone in another dtype, and runs it under autocast (ours).

    Parameters with one dimension (norms, biases) and adapters stay unchanged. If autocast is
    already on, the caller's settings apply. Otherwise the backbone's outputs are cast back to
    float32, so neck and head need no changes.

    Args:
        backbone: The backbone.
        dtype: The dtype for the matrices.
        keep: Names of trained parameters and modules, which stay unchanged. Defaults to none.
    """

    def __init__(self, backbone: nn.Module, dtype: torch.dtype, keep: Sequence[str] = ()) -> None:
        super().__init__(backbone)
        self.dtype = dtype
        self._originals = {
            name: parameter.dtype
            for name, parameter in backbone.named_parameters()
            if parameter.dim() > 1 and parameter.is_floating_point()
            if not is_adapter(name) and not is_below(name, keep)
        }

    def hold(self) -> None:
        """Cast the matrices."""
        parameters = dict(self.module.named_parameters())
        for name in self._originals:
            parameters[name].data = parameters[name].data.to(self.dtype)
        self.replace()

    def release(self) -> None:
        """Cast the matrices back. Their values stay rounded to the other dtype."""
        self.restore()
        parameters = dict(self.module.named_parameters())
        for name, dtype in self._originals.items():
            parameters[name].data = parameters[name].data.to(dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the backbone under autocast."""
        device = device_of(self.module).type
        if is_autocast_enabled(device):
            return self.host_forward(*args, **kwargs)
        with torch.autocast(device, self.dtype):
            out = self.host_forward(*args, **kwargs)
        return tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.dtype == self.dtype else t, out)
