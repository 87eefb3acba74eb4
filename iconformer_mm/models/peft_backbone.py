"""What the backbones that are born adapted share."""

from __future__ import annotations

from typing import Any

from torch import nn

from iconformer_mm.tuning import inject


class PEFTBackbone(nn.Module):
    """Mixin before a backbone's class: builds the backbone, then adapts it.

    Args:
        *args: Arguments of the parent class.
        peft: Config of the PEFT method, e.g. ``dict(bottleneck=32)``;
            ``type='icon'`` unless given; ``frozen_dtype`` and ``with_cp`` of
            :func:`iconformer_mm.inject` may stand in it, too. Defaults to None, iCoN with its
            defaults.
        **kwargs: Arguments of the parent class.
    """

    def __init__(self, *args: Any, peft: dict | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = dict(peft or {})
        inject(self, options.pop('type', 'icon'), **options)
