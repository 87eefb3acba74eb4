"""Mixed precision where MMEngine's AmpOptimWrapper does not run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from iconformer_mm.compat import device_of

# What MMEngine's wrappers of other precisions take beyond what all wrappers take.
AMP_OPTIONS = ('loss_scale', 'dtype', 'use_fsdp')
APEX_OPTIONS = (
    'opt_level',
    'enabled',
    'cast_model_type',
    'patch_torch_functions',
    'keep_batchnorm_fp32',
    'master_weights',
    'cast_model_outputs',
    'num_losses',
    'verbosity',
    'min_loss_scale',
    'max_loss_scale',
)


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """MMEngine's OptimWrapper under bfloat16 autocast, on any device, CPUs included.

    bfloat16 has float32's range, so no loss scaling is needed. MMEngine's own
    AmpOptimWrapper asks for a GPU.

    Args:
        loss_scale: Not used. It is taken so that the config of an AmpOptimWrapper can be run. Defaults to None.
        dtype: None or ``'bfloat16'``. Defaults to None.
        **kwargs: Arguments of MMEngine's OptimWrapper, such as ``optimizer`` and ``accumulative_counts``.

    Raises:
        ValueError: Another dtype is asked for.

    Example:
        >>> optim_wrapper = dict(type='BFloat16OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
    """

    def __init__(
        self, loss_scale: float | str | dict | None = None, dtype: str | torch.dtype | None = None, **kwargs: Any
    ) -> None:
        if dtype not in (None, 'bfloat16', torch.bfloat16):
            raise ValueError(f"BFloat16OptimWrapper computes in 'bfloat16', got dtype={dtype!r}")
        super().__init__(**kwargs)

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Forward passes within it run in bfloat16 where that is safe."""
        device = device_of(model).type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
