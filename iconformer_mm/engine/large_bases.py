"""Backbones that a runner builds without values, and fills from shards after they are adapted."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from iconformer_mm.checkpoint import empty_parameters, load_shards
from iconformer_mm.checkpoint.shards import INDEX
from iconformer_mm.registry import is_type
from iconformer_mm.tuning.accounting import LoadRecord
from iconformer_mm.tuning.backbones import join

_KEY = '_peft_shards'


def without_values(node: Any) -> Any:
    """Copy a model's config, in which parts whose weights are an index of shards are built without values.

    These are parts with ``init_cfg=dict(type='Pretrained', checkpoint='....safetensors.index.json')``.
    :func:`fill` loads them.

    Args:
        node: The config of a model, or a part of it.
    """
    if isinstance(node, dict):
        if _is_sharded(node.get('init_cfg')):
            return dict(type=_build_without_values, part=node)
        return type(node)({key: without_values(value) for key, value in node.items()})
    if isinstance(node, (list, tuple)):
        return type(node)(without_values(item) for item in node)
    return node


def _is_sharded(init: Any) -> bool:
    return (
        isinstance(init, dict)
        and is_type(init, 'Pretrained', 'PretrainedInit')
        and str(init.get('checkpoint', '')).endswith(INDEX)
    )


def _build_without_values(part: dict[str, Any]) -> nn.Module:
    part = copy.deepcopy(part)
    source = part.pop('init_cfg')
    with empty_parameters():
        built = MODELS.build(part)
    vars(built)[_KEY] = (source['checkpoint'], source.get('prefix') or '')
    built.is_init = True  # by fill(), not by MMEngine
    return built


def fill(model: nn.Module, record: LoadRecord) -> None:
    """Load the parts of a model that were built without values.

    Args:
        model: The model, adapted or not.
        record: Records what is loaded.

    Raises:
        DamagedFileError: A file is truncated or altered, or an index is wrong.
        FileNotFoundError: A file does not exist.
        WeightsError: The files do not fit the model.
    """
    for path, module in list(model.named_modules()):
        if _KEY in vars(module):
            load_shards(module, *vars(module).pop(_KEY))
            record.note(join(path, name) for name in module.state_dict())
