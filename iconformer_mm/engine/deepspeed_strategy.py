"""DeepSpeed's ZeRO stages 0 to 2 for adapted models, by MMEngine's strategy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine._strategy import BaseStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import STRATEGIES
from torch import Tensor, nn
from torch.optim import Optimizer

from iconformer_mm.checkpoint import DamagedFileError
from iconformer_mm.registry import accepted, type_name

# Optimizers of torch that treat each value by itself. ZeRO gives them parts of flattened parameters.
_ELEMENTWISE = ('SGD', 'Adam', 'AdamW', 'NAdam', 'RAdam', 'RMSprop', 'Adamax', 'Adadelta', 'Rprop')
# Options that are refused, with the reason.
_HALF = "DeepSpeed casts adapters, too. Leave it out, and hold the base in frozen_dtype='bfloat16' of the PEFTHook"
_REFUSED = {
    'fp16': _HALF,
    'bf16': _HALF,
    'amp': _HALF,
    'inputs_to_half': _HALF,
    'activation_checkpointing': 'recompute blocks with with_cp=True of the PEFTHook instead',
    'exclude_frozen_parameters': 'AdapterCheckpointHook leaves frozen parameters out',
    'optimizer': 'the optimizer is the one of `optim_wrapper`',
    'scheduler': 'schedules are those of `param_scheduler`',
}
_WRAPPERS = ('', 'OptimWrapper', 'DeepSpeedOptimWrapper')


def complete_deepspeed(strategy: dict) -> dict:
    """Check the config of MMEngine's DeepSpeedStrategy, and turn it into that of :class:`AdapterDeepSpeedStrategy`.

    Args:
        strategy: The config.

    Raises:
        ValueError: An option cannot be kept.
    """
    config = {**_read(strategy.get('config')), **{k: v for k, v in strategy.items() if k not in ('config', 'type')}}
    for name, reason in _REFUSED.items():
        value = config.get(name)
        if value and not (isinstance(value, Mapping) and value.get('enabled') is False):
            raise ValueError(f"strategy 'DeepSpeedStrategy': {name}={value!r} is not supported: {reason}")
    if config.get('gradient_accumulation_steps') not in (None, 1):
        raise _accumulation_error(f'gradient_accumulation_steps={config["gradient_accumulation_steps"]!r}')
    zero = config.get('zero_optimization') or {}
    if zero.get('stage') == 3:
        raise ValueError(
            "strategy 'DeepSpeedStrategy' with zero_optimization.stage=3 splits the adapters, so they could not be "
            "written: use stage 1 or 2, or strategy=dict(type='FSDPStrategy'), which gathers them"
        )
    for name in ('offload_optimizer', 'offload_param'):
        if (zero.get(name) or {}).get('device', 'none') != 'none':
            raise ValueError(
                f"strategy 'DeepSpeedStrategy': zero_optimization.{name} is not supported: the optimizer's state of "
                'adapters is small. Leave it out'
            )
    strategy = dict(strategy, type='AdapterDeepSpeedStrategy')
    if not {'train_batch_size', 'train_micro_batch_size_per_gpu'} & config.keys():
        strategy['train_micro_batch_size_per_gpu'] = 1  # DeepSpeed needs a number, and only logs it
    return strategy


@STRATEGIES.register_module()
class AdapterDeepSpeedStrategy(DeepSpeedStrategy):
    """MMEngine's DeepSpeedStrategy for adapted models, with ZeRO stages 0, 1 and 2.

    ``DeepSpeedStrategy`` in a config becomes this one. Adapters, frozen weights and the trained rest are whole on every
    process. The optimizer's state is split by stages 1 and 2, gradients by stage 2. Checkpoints hold whole tensors,
    gathered, in the format of a run of one process, and any number of processes resumes from them.

    ``optim_wrapper`` may be that of any other run: its ``clip_grad`` becomes DeepSpeed's ``gradient_clipping``.

    Args:
        config: DeepSpeed's config, or the path of a JSON file. Defaults to none.
        **kwargs: Entries of DeepSpeed's config, and arguments of MMEngine's ``BaseStrategy``.

    Raises:
        ValueError: The optimizer wrapper or the optimizer cannot be kept.

    Example:
        >>> runner_type = 'FlexibleRunner'
        >>> strategy = dict(type='DeepSpeedStrategy', zero_optimization=dict(stage=2))
    """

    def __init__(self, *, config: str | dict | None = None, **kwargs: Any) -> None:
        # MMEngine's own would register DeepSpeed's optimizers: twice with two strategies, and from modules that
        # DeepSpeed no longer has.
        base = {name: kwargs.pop(name) for name in accepted(BaseStrategy) & kwargs.keys()}
        BaseStrategy.__init__(self, **base)
        self.config = {'steps_per_print': 10**13, **_read(config), **kwargs}
        self._inputs_to_half = None
        self._groups: list[list[nn.Parameter]] = []

    def check_optim_wrapper(self, optim_wrapper: Any) -> None:
        """Check the config of an optimizer wrapper, before a model is built.

        Raises:
            ValueError: An option cannot be kept.
        """
        if isinstance(optim_wrapper, dict):
            self._translate(optim_wrapper)

    def _translate(self, optim_wrapper: dict) -> tuple[dict, float | None]:
        """Return the config for DeepSpeed's wrapper, and the largest norm of gradients."""
        options = dict(optim_wrapper)
        name = type_name(options)
        if name not in _WRAPPERS:
            raise ValueError(
                f"strategy 'DeepSpeedStrategy' runs its own optimizer wrapper, not {name}: use type='OptimWrapper'. "
                "For less memory, set frozen_dtype='bfloat16' of the PEFTHook"
            )
        count = options.pop('accumulative_counts', 1)
        if count != 1:
            raise _accumulation_error(f'accumulative_counts={count!r}')
        given = options.pop('clip_grad', None)
        clip = dict(given or {})
        most = clip.pop('max_norm', None)
        if (clip.pop('type', 'norm'), clip.pop('norm_type', 2)) != ('norm', 2) or clip:
            raise ValueError(
                "strategy 'DeepSpeedStrategy' clips gradients by their 2-norm, so `clip_grad` must be "
                f'dict(max_norm=...), got {given!r}'
            )
        own = self.config.get('gradient_clipping')
        if most is not None and own not in (None, 0, most):
            raise ValueError(f'clip_grad.max_norm is {most!r}, and gradient_clipping of the strategy {own!r}: set one')
        unknown = options.keys() - {'type', 'optimizer', 'constructor', 'paramwise_cfg', '_scope_'}
        if unknown:
            raise ValueError(
                f"strategy 'DeepSpeedStrategy': {min(unknown)!r} of `optim_wrapper` is not supported; remove it"
            )
        return dict(options, type='DeepSpeedOptimWrapper'), most

    def build_optim_wrapper(self, optim_wrapper: Any, model: nn.Module | None = None) -> BaseOptimWrapper:
        """Build DeepSpeed's wrapper from the config of any, and scale learning rates if the config asks for it."""
        if isinstance(optim_wrapper, dict):
            optim_wrapper, most = self._translate(optim_wrapper)
            if most is not None:
                self.config['gradient_clipping'] = most
        self.optim_wrapper = super().build_optim_wrapper(optim_wrapper, model)
        self._scale_lr()  # which MMEngine's strategy leaves out
        return self.optim_wrapper

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        """Hand the model, and the optimizer if it is trained, to DeepSpeed."""
        given = self.config
        stage = (given.get('zero_optimization') or {}).get('stage', 0)
        if not hasattr(self, 'optim_wrapper'):
            self.config = {**given, 'zero_optimization': dict(stage=0)}  # the others need an optimizer
        else:
            optimizer = self.optim_wrapper.optimizer
            self._groups = [list(group['params']) for group in optimizer.param_groups]
            kind = type(optimizer)
            if stage and kind not in {getattr(torch.optim, name) for name in _ELEMENTWISE}:
                raise ValueError(
                    f"strategy 'DeepSpeedStrategy' with zero_optimization.stage={stage} updates parts of flattened "
                    f'parameters, which changes {kind.__name__}: use stage 0, or one of {", ".join(_ELEMENTWISE)}'
                )
            self.config = {**given, 'zero_allow_untested_optimizer': True}
        try:
            return super()._wrap_model(model)
        finally:
            self.config = given

    def model_state_dict(self) -> dict:
        """Return the weights by the names of the bare model. Every process has them whole."""
        return {name: value.detach().cpu() for name, value in self.model.module.state_dict().items()}

    def optim_state_dict(self) -> dict:
        """Return the optimizer's state with whole tensors, in the format of one process. All must call it."""
        optimizer: Any = self.optim_wrapper.optimizer
        if not is_split(optimizer):
            return {**optimizer.state_dict(), **self.optim_wrapper.state_dict()}
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict] = []
        end = 0
        for group, (parameters, flat) in zip(optimizer.param_groups, self._parts()):
            start, end = end, end + len(parameters)
            indices = range(start, end)
            groups.append({**{k: v for k, v in group.items() if k != 'params'}, 'params': list(indices)})
            slots = dict(optimizer.optimizer.state.get(flat) or {})
            for index, parameter in zip(indices, parameters) if slots else ():
                state[index] = {n: _gathered(v, parameter) if _is_part(v, flat) else v for n, v in slots.items()}
        return dict(state=state, param_groups=groups, **self.optim_wrapper.state_dict())

    @torch.no_grad()
    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load a state with whole tensors, of any number of processes. Each process keeps its part.

        Raises:
            DamagedFileError: The state is not one of this run's optimizer.
        """
        optimizer: Any = self.optim_wrapper.optimizer
        state_dict = dict(state_dict)
        self.optim_wrapper.load_state_dict(state_dict)  # takes its own settings out
        counts = [len(group['params']) for group in state_dict['param_groups']]
        if counts != [len(parameters) for parameters in self._groups]:
            raise DamagedFileError(
                'the checkpoint has other parameter groups than the optimizer of this run. Resume with the method and '
                'the `optim_wrapper` that it was trained with'
            )
        if not is_split(optimizer):
            optimizer.load_state_dict(state_dict)
            return
        end = 0
        for group, saved, (parameters, flat) in zip(optimizer.param_groups, state_dict['param_groups'], self._parts()):
            group.update({k: v for k, v in saved.items() if k != 'params'})
            start, end = end, end + len(parameters)
            slots = [state_dict['state'].get(index) or {} for index in range(start, end)]
            if not any(slots):
                continue
            made = {}
            for name, first in slots[0].items():
                values = [slot.get(name) for slot in slots]
                if any(isinstance(value, Tensor) and value.dim() for value in values):
                    made[name] = _split(values, parameters, flat)
                elif all(_equal(value, first) for value in values):
                    made[name] = first
                else:
                    raise DamagedFileError(
                        f"the checkpoint's optimizer counts {name!r} for each parameter, and ZeRO for all of them: "
                        'resume with zero_optimization.stage=0, or without DeepSpeed'
                    )
            optimizer.optimizer.state[flat] = made

    def _parts(self) -> Iterator[tuple[list[nn.Parameter], Tensor]]:
        """Yield the parameters of each group with this process's part of their concatenation."""
        optimizer: Any = self.optim_wrapper.optimizer
        yield from zip(self._groups, optimizer.single_partition_of_fp32_groups)

    def load_model_state_dict(self, state_dict: dict, **kwargs: Any) -> None:
        """Refuse to load into a wrapped model: ZeRO would not see it.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            'weights are loaded before DeepSpeed wraps a model, by the runner that iconformer_mm.engine.build_runner '
            'builds'
        )

    # Gathered on all processes and written by the first, as one file. MMEngine's would write DeepSpeed's own format.
    save_checkpoint: Any = SingleDeviceStrategy.save_checkpoint


def _read(config: str | dict | None) -> dict:
    return json.loads(Path(config).read_text(encoding='utf-8')) if isinstance(config, str) else dict(config or {})


def is_split(optimizer: Optimizer) -> bool:
    """Whether an optimizer is ZeRO's of stage 1 or 2, which holds parts of flattened parameters."""
    return hasattr(optimizer, 'single_partition_of_fp32_groups')


def _accumulation_error(option: str) -> ValueError:
    return ValueError(
        f"strategy 'DeepSpeedStrategy': {option} is not supported, since a resumed run would lose gradients: use "
        "strategy=dict(type='FSDPStrategy')"
    )


def _is_part(value: Any, flat: Tensor) -> bool:
    """Whether an optimizer's slot has an element for each of a part."""
    return isinstance(value, Tensor) and value.shape == flat.shape and value.dim() > 0


def _addresses(parameter: Any) -> tuple[slice, slice] | None:
    """Return which elements of a parameter this process holds, and where in its part; None if it holds none."""
    mapping = parameter._hp_mapping  # of DeepSpeed
    if mapping is None:
        return None
    own, part = mapping.lp_fragment_address, mapping.hp_fragment_address
    return slice(own.start, own.start + own.numel), slice(part.start, part.start + part.numel)


def _gathered(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return the whole slot of a parameter, of which each process has a part. All must call it."""
    whole = torch.zeros(parameter.numel(), dtype=value.dtype, device=value.device)
    addresses = _addresses(parameter)
    if addresses is not None:
        whole[addresses[0]] = value[addresses[1]]
    torch.distributed.all_reduce(whole)  # other processes have zeros there
    return whole.view(parameter.shape).cpu()


def _split(values: list[Any], parameters: list[nn.Parameter], flat: Tensor) -> Tensor:
    """Return this process's part of the whole slots of parameters."""
    part = torch.zeros_like(flat)
    for value, parameter in zip(values, parameters):
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            raise DamagedFileError("the checkpoint's optimizer has state of other shapes than the parameters")
        addresses = _addresses(parameter)
        if addresses is not None:
            part[addresses[1]] = value.flatten()[addresses[0]].to(part)
    return part


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.shape == other.shape and torch.equal(value, other)
    return type(value) is type(other) and value == other
