"""Hands the optimizer what is trained, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn


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

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with ``optimizer``.
        paramwise_cfg: Rules for the inner constructor. Its key
            ``constructor`` names that constructor. Defaults to None and
            ``'DefaultOptimWrapperConstructor'``.

    Raises:
        ValueError: Nothing in the model is trainable.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='PEFTOptimWrapperConstructor', optimizer=dict(type='AdamW', lr=1e-3))
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
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
            return self.inner(model)
