"""What a cache was made of, as a digest: another base, prefix, pipeline or data gives another cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from iconformer_mm.tuning.backbones import is_below
from iconformer_mm.tuning.families import class_path
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.prefix import FrozenPrefix, PrefixPlan

from .records import UnstorableError, encode

# Attributes that say how a module runs, not what it computes.
_HOW = ('training', 'with_cp', 'grad_checkpointing', 'use_checkpoint', 'frozen_stages')
_PLAIN = (bool, int, float, str, type(None))


def digest_of(content: Any) -> str:
    """SHA-256 of plain data. Objects in it count by their representation."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()


def describe_prefix(prefix: FrozenPrefix, plan: PrefixPlan) -> dict[str, Any]:
    """What a prefix computes: its modules, their options, and a digest of its weights.

    Args:
        prefix: The prefix.
        plan: What is recorded of it.
    """
    later = [*plan.later, *prefix.trained]
    digest = hashlib.sha256()
    own = {
        name: value
        for name, value in prefix.backbone.state_dict().items()
        if not is_adapter(name) and not is_below(name, later)
    }
    for name, value in sorted(own.items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}\n'.encode())
        digest.update(_bytes(value))
    modules = {
        name: _options(module)
        for name, module in prefix.backbone.named_modules()
        if not is_adapter(name) and not is_below(name, later)
    }
    return dict(
        backbone=class_path(type(prefix.backbone)),
        reads=[value.name for value in plan.values],
        blocks=len(plan.blocks),
        weights=digest.hexdigest(),
        modules=digest_of(modules),
    )


def describe_preprocessor(module: nn.Module) -> str:
    """Digest of what a data preprocessor does."""
    modules = {name: _options(child) for name, child in module.named_modules()}
    buffers = {name: value.flatten().tolist() for name, value in module.named_buffers()}
    return digest_of([modules, buffers])


def describe_data(dataset: Dataset, config: Any) -> dict[str, Any]:
    """What a data set gives: its config, and digests of its annotations and of the sizes and times of its files.

    Args:
        dataset: The data set.
        config: Its config; None if it was built by the user.
    """
    annotations = hashlib.sha256()
    files: dict[str, tuple[int, int]] = {}
    get_info: Any = getattr(dataset, 'get_data_info', None)
    count = len(dataset)  # type: ignore[arg-type]
    for index in range(count) if get_info is not None else ():
        info = get_info(index)
        try:
            annotations.update(encode(info))
        except UnstorableError:
            annotations.update(repr(info).encode())
        for path in _paths(info):
            if path not in files and os.path.isfile(path):
                found = os.stat(path)
                files[path] = found.st_size, found.st_mtime_ns
    if isinstance(config, Mapping):
        text = json.dumps(dict(config), sort_keys=True, default=repr)
    else:
        text = f'{class_path(type(dataset))} {getattr(dataset, "pipeline", None)!r}'
    return dict(
        data=class_path(type(dataset)),
        images=count,
        pipeline=hashlib.sha256(text.encode()).hexdigest(),
        annotations=annotations.hexdigest(),
        files=digest_of(sorted(files.items())),
    )


def _paths(info: Any) -> list[str]:
    if not isinstance(info, Mapping):
        return []
    return [v for k, v in info.items() if isinstance(v, str) and ('path' in str(k) or 'file' in str(k))]


def _options(module: nn.Module) -> list[Any]:
    plain = {n: v for n, v in vars(module).items() if not n.startswith('_') and n not in _HOW and _is_plain(v)}
    return [class_path(type(module)), plain]


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return isinstance(value, _PLAIN)


def _bytes(value: Tensor) -> Any:
    flat = value.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else np.empty(0, np.uint8).data
