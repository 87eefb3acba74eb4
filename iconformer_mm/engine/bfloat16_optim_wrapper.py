"""Mixed precision on devices that MMEngine's AmpOptimWrapper does not support."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from iconformer_mm.compat import device_of

# Options of MMEngine's mixed-precision wrappers that other wrappers do not accept.
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
    """MMEngine's OptimWrapper under bfloat16 autocast, on any device including CPUs.

    bfloat16 has the range of float32, so it needs no loss scaling. MMEngine's own
    AmpOptimWrapper requires a GPU.

    Args:
        loss_scale: Ignored. It is accepted so that configs for AmpOptimWrapper run unchanged. Defaults to None.
        dtype: None or ``'bfloat16'``. Defaults to None.
        **kwargs: Arguments of MMEngine's OptimWrapper, such as ``optimizer`` and ``accumulative_counts``.

    Raises:
        ValueError: ``dtype`` is another dtype.

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
        """Run forward passes within the context in bfloat16 where autocast considers it safe."""
        device = device_of(model).type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
