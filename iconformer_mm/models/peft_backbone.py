"""The base class of backbones with built-in adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from iconformer_mm.tuning import inject


class PEFTBackbone(nn.Module):
    """Mixin that builds a backbone and then adapts it. List it before the backbone's class.

    Args:
        *args: Arguments of the parent class.
        peft: Config of the PEFT method, e.g. ``dict(bottleneck=32)``. Its ``type`` defaults to
            ``'icon'``. It may also contain ``frozen_dtype`` and ``with_cp`` of
            :func:`iconformer_mm.inject`. Defaults to None, iCoN with default options.
        **kwargs: Arguments of the parent class.
    """

    def __init__(self, *args: Any, peft: dict | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = dict(peft or {})
        inject(self, options.pop('type', 'icon'), **options)
