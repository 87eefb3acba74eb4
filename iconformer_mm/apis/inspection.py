"""What a config would train, and at what cost, before any training; and the usual mistakes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iconformer_mm.checkpoint.adapter_file import is_adapter_file
from iconformer_mm.checkpoint.safetensors_io import read_metadata
from iconformer_mm.tuning import Summary, get_injection, inject, summarize
from iconformer_mm.tuning.accounting import NO_WEIGHTS
from iconformer_mm.tuning.injection import backbones_of

MIB = 2**20


def hooks_of(cfg: Config) -> Iterator[Mapping[str, Any]]:
    """The configs of all hooks."""
    for hook in [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]:
        if hook:
            yield hook


def method_of(cfg: Config) -> dict[str, Any] | None:
    """Arguments for :func:`iconformer_mm.inject`, of a config's PEFTHook; None if it has none."""
    for hook in hooks_of(cfg):
        if hook['type'] == 'PEFTHook':
            return {key: value for key, value in hook.items() if key not in ('type', 'save_adapter', 'priority')}
    return None


def names_weights(node: Any) -> bool:
    """Whether a model's config says where pre-trained weights come from.

    Args:
        node: The config of the model, or a part of it.
    """
    if isinstance(node, Mapping):
        inits = node.get('init_cfg') or []
        inits = inits if isinstance(inits, (list, tuple)) else [inits]
        # `pretrained` is a name in older configs of MMSegmentation; with timm's models it is a switch, whose
        # default differs from library to library, and there is `checkpoint_path`.
        if node.get('checkpoint_path') or node.get('pretrained', _timm_default(node.get('type'))):
            return True
        return any(init.get('type') == 'Pretrained' for init in inits) or any(map(names_weights, node.values()))
    return isinstance(node, (list, tuple)) and any(map(names_weights, node))


def _timm_default(kind: Any) -> bool:
    """Whether a backbone is one of timm's that takes its weights unless it is told not to."""
    if not str(getattr(kind, '__name__', kind)).endswith('TIMMBackbone'):
        return False
    built = MODELS.get(kind) if isinstance(kind, str) else kind
    option = inspect.signature(built.__init__).parameters.get('pretrained') if built is not None else None
    # Classes of ours hand their arguments on.
    if option is None and built is not None:
        option = next(
            (found for base in built.__mro__ if (found := inspect.signature(base).parameters.get('pretrained'))), None
        )
    return option is not None and option.default is True


def _gives_base(path: Any) -> bool:
    """Whether ``load_from`` may hold base weights: all but an adapter file may."""
    if not path:
        return False
    if str(path).endswith('.safetensors') and Path(path).is_file():
        return not is_adapter_file(read_metadata(path))
    return True


def build_model(cfg: Config) -> BaseModel:
    """The model of a config, on one process, without its pre-trained weights."""
    init_default_scope(cfg.default_scope)
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:  # MMPretrain's stands beside the model
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return revert_sync_batchnorm(MODELS.build(model))


def find_mistakes(cfg: Config) -> list[str]:
    """What is probably not meant so in a config for parameter-efficient fine-tuning.

    Args:
        cfg: The config.

    Returns:
        A sentence a finding: what it is, and what to do.
    """
    backbone = cfg.model.get('backbone') or {}
    method = method_of(cfg)
    born_adapted = str(backbone.get('type', '')).rpartition('.')[2].startswith('ICoN')
    if method is None and not born_adapted:
        return []  # stock fine-tuning
    name = (method or {}).get('method', 'icon')
    name = name if isinstance(name, str) else name.get('type')
    if name == 'full':
        return []
    found = []
    if not names_weights(cfg.model) and not _gives_base(cfg.get('load_from')) and not cfg.get('resume'):
        found.append(NO_WEIGHTS)
    if backbone.get('frozen_stages', -1) >= 0:
        found.append(
            f'frozen_stages={backbone["frozen_stages"]} has no effect: the whole backbone is frozen, and adapters are '
            'trained in every stage'
        )
    wrapper = cfg.get('model_wrapper_cfg') or {}
    if cfg.get('find_unused_parameters') or wrapper.get('find_unused_parameters'):
        found.append('find_unused_parameters costs time and is not needed: frozen parameters are not waited for')
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    rate = optimizer.get('lr')
    if str(optimizer.get('type', '')).startswith('Adam') and rate is not None and rate < 3e-5 and name != 'frozen':
        found.append(
            f'lr={rate:g} is a rate for full fine-tuning; adapters start from zero and want more, 1e-3 to 1e-2 with '
            f'{optimizer["type"]}'
        )
    return found


@dataclass(frozen=True)
class Cost:
    """What a training step of one image takes in the backbone.

    Attributes:
        gflop: Billions of floating-point operations of the forward pass.
        stored_mib: MiB that the forward pass stores for the backward pass, parameters not counted.
        gradient_mib: MiB of the gradients of what is trained in the whole model; also what
            data-parallel training exchanges a step.
        optimizer_mib: MiB of AdamW's two states of it.
        checkpoint_mib: MiB of what was trained.
    """

    gflop: float
    stored_mib: float
    gradient_mib: float
    optimizer_mib: float
    checkpoint_mib: float


def cost_of(model: nn.Module, shape: tuple[int, int]) -> Cost:
    """Measure a model's backbones on one image, and count what else its training takes.

    Args:
        model: A model, adapted or not.
        shape: Height and width of the image in pixels.
    """
    backbones = list(backbones_of(model).values())
    parameters = {p.untyped_storage().data_ptr() for backbone in backbones for p in backbone.parameters()}
    stored: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outs = []  # alive, so that no address is given out twice
        for backbone in backbones:
            first = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
            outs.append(backbone(torch.zeros(1, first.in_channels, *shape)))
    del outs
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) / MIB
    return Cost(counter.get_total_flops() / 1e9, sum(stored.values()) / MIB, trained, 2 * trained, trained)


@dataclass(frozen=True)
class Inspection:
    """What a config would train.

    Attributes:
        summary: Counts of parameters.
        sites: Name and kind of each adapted module, and the parameters it is given.
        cost: What it costs.
        full: What full fine-tuning would cost.
        mistakes: See :func:`find_mistakes`.
    """

    summary: Summary
    sites: list[tuple[str, str, int]]
    cost: Cost
    full: Cost
    mistakes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def inspect_model(cfg: Config, shape: tuple[int, int] = (224, 224)) -> Inspection:
    """Look at what a config would train, without weights, data or training.

    Args:
        cfg: The config, with a PEFTHook or a backbone that is born adapted.
        shape: Height and width of the images in pixels. Defaults to 224 x 224.

    Raises:
        ValueError: The method cannot be carried out on the model.
    """
    model = build_model(cfg)
    method = method_of(cfg)
    if get_injection(model) is None:
        full = cost_of(model, shape)
        inject(model, **(dict(method='full') if method is None else method))
    else:
        plain = copy.deepcopy(cfg)
        plain.model.backbone.peft = dict(type='full')
        full = cost_of(build_model(plain), shape)
    injection = get_injection(model)
    sites = [
        (name, a.kind, sum(p.numel() for adapter in a.adapters.values() for p in adapter.parameters()))
        for name, a in (injection.named_attachments().items() if injection else ())
    ]
    return Inspection(summarize(model), sites, cost_of(model, shape), full, find_mistakes(cfg))
