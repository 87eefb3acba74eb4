"""Building optimizers over the trainable parameters only."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from rich.console import Console
from rich.table import Table
from torch import nn

from iconformer_mm.tuning.backbones import is_below, join
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import backbones_of, get_injection, outside_of, unwrap


@contextmanager
def only_trainable(model: nn.Module) -> Iterator[None]:
    """Restrict ``model.named_parameters()`` to trainable parameters within the context."""
    originals = {module: module._parameters for module in model.modules()}
    try:
        for module, parameters in originals.items():
            module._parameters = {n: p for n, p in parameters.items() if p is None or p.requires_grad}
        yield
    finally:
        for module, parameters in originals.items():
            module._parameters = parameters


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class PEFTOptimWrapperConstructor:
    """Builds an optimizer wrapper over the trainable parameters (ours).

    MMEngine's default constructor also gives frozen parameters to the optimizer,
    or logs a warning for each if there is a ``paramwise_cfg``. This constructor
    hides them from an inner constructor. The inner constructor's rules
    (``custom_keys``, layer decay, ...) then apply to the trained parameters.

    There is one exception. Many configs give the backbone a smaller learning rate, by
    ``custom_keys`` or layer decay. This is meant for pre-trained weights. Adapters are
    new, so they train at the base learning rate. Parameters of the backbone that are
    trained in place (``unfreeze``) are pre-trained, so they follow the rules.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with ``optimizer``.
        paramwise_cfg: Rules for the inner constructor, and two more keys.
            ``constructor`` names the inner constructor and defaults to
            ``'DefaultOptimWrapperConstructor'``. ``adapter_lr_mult`` is the ratio of
            the adapters' learning rate to the base one and defaults to 1. If it is None,
            or if a custom key contains ``'adapter'``, the inner constructor's rules
            also apply to adapters. Defaults to None.

    Raises:
        ValueError: Nothing in the model is trainable.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='PEFTOptimWrapperConstructor', optimizer=dict(type='AdamW', lr=1e-3))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        self.base_lr = optim_wrapper_cfg['optimizer'].get('lr')
        self.adapter_lr_mult = paramwise_cfg.pop('adapter_lr_mult', 1.0)
        if any('adapter' in key for key in paramwise_cfg.get('custom_keys') or {}):
            self.adapter_lr_mult = None
        constructor = paramwise_cfg.pop('constructor', 'DefaultOptimWrapperConstructor')
        self.inner = OPTIM_WRAPPER_CONSTRUCTORS.build(
            dict(type=constructor, optim_wrapper_cfg=optim_wrapper_cfg, paramwise_cfg=paramwise_cfg or None)
        )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer wrapper of a model."""
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                f'nothing to train in {type(model).__name__}: all its parameters are frozen. Add a head to the model, '
                "or use another PEFT method than 'frozen'"
            )
        with only_trainable(model):
            optim_wrapper = self.inner(model)
        if self.base_lr is not None and self.adapter_lr_mult is not None:
            kinds = kinds_of_parameters(model)
            adapters = {id(p) for p in model.parameters() if kinds.get(id(p)) == ADAPTERS}
            set_learning_rate(optim_wrapper, adapters, self.base_lr * self.adapter_lr_mult)
        return optim_wrapper


ADAPTERS = 'adapters'


def kinds_of_parameters(model: nn.Module) -> dict[int, str]:
    """Map the ``id`` of each trainable parameter to its kind: adapters, a backbone, or a part outside of it."""
    model = unwrap(model)
    injection = get_injection(model)
    backbones = backbones_of(model)
    kinds: dict[int, str] = {}
    for path, backbone in backbones.items():
        outside = [] if injection is None else outside_of(injection, backbone)
        for name, parameter in backbone.named_parameters():
            if parameter.requires_grad and not is_below(name, outside):
                adapter = injection is not None and is_adapter(name)
                kinds[id(parameter)] = ADAPTERS if adapter else (join(path, '') or 'backbone')
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kinds.setdefault(id(parameter), name.partition('.')[0])
    return kinds


def set_learning_rate(optim_wrapper: Any, parameters: set[int], rate: float) -> None:
    """Set the learning rate of some parameters, and split their parameter groups if necessary.

    Args:
        optim_wrapper: The optimizer wrapper.
        parameters: The ``id`` of each parameter.
        rate: The learning rate.
    """
    for wrapper in optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]:
        for group in list(wrapper.optimizer.param_groups):
            inside = [id(p) in parameters for p in group['params']]
            if not any(inside) or group['lr'] == rate:
                continue
            if all(inside):
                group['lr'] = rate
                continue
            # Lists with one item per parameter, such as names.
            lists = {k: v for k, v in group.items() if isinstance(v, list) and len(v) == len(inside)}
            new = {**group, 'lr': rate, **{k: [x for x, i in zip(v, inside) if i] for k, v in lists.items()}}
            group.update({k: [x for x, i in zip(v, inside) if not i] for k, v in lists.items()})
            wrapper.optimizer.add_param_group(new)


def describe_groups(model: nn.Module, optim_wrapper: Any) -> str:
    """Format a table of the optimizer's parameters by learning rate and weight decay.

    Args:
        model: The model.
        optim_wrapper: Its optimizer wrapper, or several in an ``OptimWrapperDict``.
    """
    kinds = kinds_of_parameters(model)
    rows: dict[tuple[str, Any, Any], list[int]] = {}
    wrappers = optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]
    for wrapper in wrappers:
        for group in wrapper.optimizer.param_groups:
            for parameter in group['params']:
                kind = kinds.get(id(parameter), 'other')
                rows.setdefault((kind, group.get('lr'), group.get('weight_decay')), []).append(parameter.numel())
    table = Table(title='learning rates', title_justify='left')
    table.add_column('trained')
    for column in ('tensors', 'parameters', 'learning rate', 'weight decay'):
        table.add_column(column, justify='right')
    order = {kind: i for i, kind in enumerate(dict.fromkeys([ADAPTERS, *(key[0] for key in rows)]))}
    for (kind, rate, decay), sizes in sorted(rows.items(), key=lambda row: order[row[0][0]]):
        numbers = ('-' if value is None else f'{value:g}' for value in (rate, decay))
        table.add_row(kind, f'{len(sizes):,}', f'{sum(sizes):,}', *numbers)
    text = io.StringIO()
    # In a notebook, rich would display the table instead of writing it to the text.
    Console(file=text, width=88, color_system=None, force_jupyter=False).print(table)
    return text.getvalue().rstrip()
