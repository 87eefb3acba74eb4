"""Hands the optimizer what is trained, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import find_backbone


@contextmanager
def only_trainable(model: nn.Module) -> Iterator[None]:
    """Within it, ``model.named_parameters()`` lists trainable parameters only."""
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

    MMEngine's default constructor gives the optimizer frozen parameters too,
    or, with a ``paramwise_cfg``, logs a warning for each. This one hides them
    from another constructor, whose rules (``custom_keys``, layer decay, ...)
    then apply to what is trained.

    One thing is otherwise: a smaller learning rate for the backbone, as many
    configs have it by ``custom_keys`` or layer decay, is meant for pre-trained
    weights. Adapters are new and train at the base learning rate.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with ``optimizer``.
        paramwise_cfg: Rules for the inner constructor, and two keys of ours.
            ``constructor`` names that constructor, by default
            ``'DefaultOptimWrapperConstructor'``. ``adapter_lr_mult`` is the
            adapters' learning rate over the base one, by default 1; with None,
            or if a custom key contains ``'adapter'``, the inner constructor's
            rules hold for adapters, too. Defaults to None.

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
                f'nothing to train in {type(model).__name__}: all its parameters are frozen. Does the model have a '
                "head, or should the PEFT method be other than 'frozen'?"
            )
        with only_trainable(model):
            optim_wrapper = self.inner(model)
        if self.base_lr is not None and self.adapter_lr_mult is not None:
            adapters = {id(p) for n, p in find_backbone(model).named_parameters() if is_adapter(n)}
            for group in optim_wrapper.param_groups:
                if all(id(p) in adapters for p in group['params']):
                    group['lr'] = self.base_lr * self.adapter_lr_mult
        return optim_wrapper
