"""The options of a prefix cache."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from iconformer_mm.files import expanded
from iconformer_mm.messages import hint

DTYPES = {None: None, 'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


@dataclass(frozen=True)
class PrefixCacheOptions:
    """What ``PEFTHook(prefix_cache=...)`` takes.

    Attributes:
        dir: Folder of the caches, one sub-folder for each.
        views: Draws of the training pipeline for each image. Defaults to None: one, of a pipeline that draws nothing
            at random.
        dtype: What recorded tensors are stored in: ``'float32'``, ``'bfloat16'`` or ``'float16'``. Defaults to None,
            as they are computed.
        validation: Whether the validation data is cached, too. Defaults to True.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    dir: Path
    views: int | None = None
    dtype: str | None = None
    validation: bool = True

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PrefixCacheOptions:
        """Check the options of a config.

        Raises:
            ValueError: One is unknown, missing or out of range.
        """
        if not isinstance(options, Mapping):
            raise ValueError(f'prefix_cache must be a dict, e.g. dict(dir=..., views=4), got {options!r}')
        known = [f.name for f in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(
                    f"prefix_cache has no option '{name}'{hint(str(name), known)}; it takes {', '.join(known)}"
                )
        folder, views, dtype = options.get('dir'), options.get('views'), options.get('dtype')
        if not isinstance(folder, (str, os.PathLike)) or not str(folder):
            raise ValueError(f'prefix_cache needs `dir`, the folder of the cache, got {folder!r}')
        if views is not None and (isinstance(views, bool) or not isinstance(views, int) or not 1 <= views <= 99):
            raise ValueError(f'prefix_cache: views must be None or a number from 1 to 99, got {views!r}')
        if dtype not in DTYPES:
            raise ValueError(f"prefix_cache: dtype must be None, 'float32', 'bfloat16' or 'float16', got {dtype!r}")
        validation = options.get('validation', True)
        if not isinstance(validation, bool):
            raise ValueError(f'prefix_cache: validation must be True or False, got {validation!r}')
        return cls(expanded(folder), views, dtype, validation)
