"""Logging of adapter statistics during training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.optim import Optimizer

from iconformer_mm.adapters import Adapter
from iconformer_mm.adapters.icon import ICoN
from iconformer_mm.checkpoint.sharded import whole
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.injection import backbones_of, unwrap

from ..deepspeed_strategy import is_split


@HOOKS.register_module()
class AdapterStatisticsHook(Hook):
    """Logs adapter statistics at an interval, for LoggerHook and all visualization backends.

    The scalars of each adapter are:

    - ``kernel_spread``: standard deviation of iCoN's kernels over the batch (and windows), mean over taps and
      channels. It is 0 for static kernels and for batches of one image.
    - ``kernel_norm``: norm of iCoN's kernels, mean over the batch and channels.
    - ``adapter_ratio``: ratio of the RMS of the adapter's output to the RMS of its input tokens.
    - ``adapter_gradient``: norm of the gradient of its parameters.

    Each is logged as ``train/<scalar>/<name of the adapter in the backbone>`` and ``train/<scalar>/mean``. Two more
    scalars are ``train/adapter_gradient/total``, the norm over all adapters, and ``train/head_gradient``, the norm
    over all trained parameters outside the backbone. Methods without kernels, or without adapters of tokens (LoRA),
    have only the other scalars.

    Gradients are those of the optimizer step: accumulated, averaged over processes, unscaled and clipped. With
    gradient accumulation they are those of the next step. All other scalars are of the iteration's batch in each
    process.

    Between the intervals the hook computes nothing and has no hook on the model. Code compiled by ``torch.compile``
    does not call hooks, so only the gradients are logged there.

    Args:
        interval: Iterations between two logs. Defaults to 50.
        per_adapter: Whether to log each adapter in addition to the mean. Defaults to True.

    Raises:
        ValueError: The model has no adapters, several optimizers, or ``interval`` is below 1.

    Example:
        >>> custom_hooks = [dict(type='PEFTHook'), dict(type='AdapterStatisticsHook', interval=50)]
    """

    priority = 'NORMAL'  # before LoggerHook

    def __init__(self, interval: int = 50, per_adapter: bool = True) -> None:
        if interval < 1:
            raise ValueError(f'interval must be at least 1, got {interval!r}')
        self.interval = interval
        self.per_adapter = per_adapter
        self._adapters: dict[str, nn.Module] = {}
        self._head: list[nn.Parameter] = []
        self._forward_handles: list[Any] = []
        self._forget_step: Callable[[], None] | None = None
        self._seen: dict[str, dict[str, Tensor]] = defaultdict(dict)  # by scalar and adapter; detached

    def before_train(self, runner: Runner) -> None:
        """Find the adapters."""
        injection = get_injection(runner.model)
        attachments = injection.named_attachments() if injection else {}
        self._adapters = {
            f'{where}.{n}'.lstrip('.'): module for where, a in attachments.items() for n, module in a.adapters.items()
        }
        if not self._adapters:
            raise ValueError('AdapterStatisticsHook finds no adapters in the model: add a PEFTHook to the config')
        if isinstance(runner.optim_wrapper, OptimWrapperDict):
            raise ValueError('AdapterStatisticsHook supports one optimizer, but there are several')
        if is_split(runner.optim_wrapper.optimizer):
            raise ValueError(
                'AdapterStatisticsHook reads whole gradients, which ZeRO splits: remove the hook, or use '
                'zero_optimization.stage=0 or another strategy'
            )
        own = {id(p) for backbone in backbones_of(runner.model).values() for p in backbone.parameters()}
        self._head = [p for p in unwrap(runner.model).parameters() if p.requires_grad and id(p) not in own]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Register the hooks if this iteration is logged."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        for name, adapter in self._adapters.items():
            if isinstance(adapter, Adapter):
                self._forward_handles.append(adapter.register_forward_hook(partial(self._see_tokens, name)))
            for module in adapter.modules():
                if isinstance(module, ICoN):
                    self._forward_handles.append(module.register_forward_hook(partial(self._see_kernels, name)))
        if self._forget_step is None:
            self._listen_to_step(runner.optim_wrapper.optimizer)

    def _listen_to_step(self, optimizer: Optimizer) -> None:
        """Read the gradients at the next optimizer step.

        A hook of the optimizer does not work. torch 2.1 calls none after anything was compiled.
        """
        step, own = optimizer.step, vars(optimizer).get('step')

        @wraps(step)
        def observed(*args: Any, **kwargs: Any) -> Any:
            forget()
            self._see_gradients()
            return step(*args, **kwargs)

        def forget() -> None:
            del vars(optimizer)['step']
            if own is not None:
                vars(optimizer)['step'] = own  # schedulers count steps with it
            self._forget_step = None

        vars(optimizer)['step'], self._forget_step = observed, forget

    @torch.no_grad()
    def _see_kernels(self, name: str, icon: ICoN, args: tuple, kernels: Tensor) -> None:
        kernels = kernels.float()
        self._seen['kernel_spread'][name] = kernels.std(dim=0, correction=0).mean()
        self._seen['kernel_norm'][name] = kernels.flatten(2).norm(dim=2).mean()

    @torch.no_grad()
    def _see_tokens(self, name: str, adapter: Adapter, args: tuple, delta: Tensor) -> None:
        self._seen['adapter_ratio'][name] = _rms(delta) / _rms(args[0]).clamp_min(1e-12)

    @torch.no_grad()
    def _see_gradients(self) -> None:
        norms = {name: whole(_gradient_norm(adapter.parameters())) for name, adapter in self._adapters.items()}
        self._seen['adapter_gradient'] = norms
        self._seen['adapter_gradient/total'] = {'': torch.stack(list(norms.values())).norm()}
        if self._head:
            self._seen['head_gradient'] = {'': whole(_gradient_norm(self._head))}

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Log the recorded values."""
        self._stop_forward()
        if not self._seen:
            return
        scalars = {}
        for scalar, values in self._seen.items():
            if '' in values:
                scalars[scalar] = values['']
                continue
            scalars[f'{scalar}/mean'] = torch.stack(list(values.values())).mean()
            if self.per_adapter:
                scalars.update({f'{scalar}/{name}': value for name, value in values.items()})
        self._seen.clear()
        for name, value in zip(scalars, torch.stack(list(scalars.values())).tolist()):  # one device synchronisation
            runner.message_hub.update_scalar(f'train/{name}', value)

    def after_train(self, runner: Runner) -> None:
        """Remove all hooks and recorded values."""
        self._stop_forward()
        if self._forget_step is not None:
            self._forget_step()
        self._seen.clear()

    def _stop_forward(self) -> None:
        for handle in self._forward_handles:
            handle.remove()
        self._forward_handles.clear()


def _rms(values: Tensor) -> Tensor:
    return values.float().square().mean().sqrt()


def _gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients as one vector. A missing gradient counts as 0."""
    return torch.stack(
        [p.new_zeros((), dtype=torch.float32) if p.grad is None else p.grad.float().norm() for p in parameters]
    ).norm()
