"""Mixed precision where MMEngine's AmpOptimWrapper does not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper under bfloat16 autocast, on any device, CPUs included.

    bfloat16 has float32's range, so no loss scaling is needed. MMEngine's own
    AmpOptimWrapper asks for a GPU.

    Example:
        >>> optim_wrapper = dict(type='BFloat16OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Forward passes within it run in bfloat16 where that is safe."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
