"""MMEngine's strategies for adapted models, and torch's ``fully_shard`` as one more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import Any

import torch
from mmengine._strategy import DDPStrategy
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_main_process
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import STRATEGIES
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from iconformer_mm.checkpoint.sharded import placed_like, whole
from iconformer_mm.registry import accepted, is_type, type_name
from iconformer_mm.tuning.families import family_of

from .deepspeed_strategy import complete_deepspeed

OLDEST_TORCH = (2, 7)  # fully_shard, and distributing tensors without sending them
# By the strategy, the package that it needs.
_LIBRARIES = {
    'DeepSpeedStrategy': 'deepspeed',
    'AdapterDeepSpeedStrategy': 'deepspeed',
    'ColossalAIStrategy': 'colossalai',
}
# Options of MMEngine's FSDPStrategy and of its wrapper that say what `fully_shard` does anyway.
_SAME = {'model_wrapper': None, 'state_dict_cfg': 'full', 'skip_init_weights': False, 'activation_checkpointing': None}
_SAME_WRAPPER = {'type': 'MMFullyShardedDataParallel', 'use_orig_params': True}


def complete_strategy(strategy: dict | None, launcher: str, find_unused_parameters: bool = False) -> dict:
    """Check the config of a strategy, and complete it for this machine.

    Args:
        strategy: The config. None stands for one process, or DDP if there is a launcher.
        launcher: How the processes were started, ``'none'`` for one process.
        find_unused_parameters: The option of DDP. Defaults to False.

    Returns:
        The config to build. MMEngine's ``FSDPStrategy`` becomes a :class:`FullyShardStrategy`, its
        ``DeepSpeedStrategy`` an :class:`~.deepspeed_strategy.AdapterDeepSpeedStrategy`.

    Raises:
        ImportError: The strategy's library is not installed.
        ValueError: The strategy has no launcher, or an option that cannot be kept.
    """
    if strategy is None:
        strategy = dict(type='SingleDeviceStrategy' if launcher == 'none' else 'DDPStrategy')
    strategy = copy.deepcopy(strategy)
    name = type_name(strategy)
    library = _LIBRARIES.get(name)
    if library is not None and find_spec(library) is None:
        raise ImportError(
            f"strategy '{name}' needs {library}, which is not installed: pip install {library}, or use "
            "strategy=dict(type='FSDPStrategy'), which needs torch alone"
        )
    if name == 'ColossalAIStrategy':
        raise ValueError(
            "strategy 'ColossalAIStrategy' rebuilds the model's layers, so adapters cannot be kept: use DDPStrategy, "
            'FSDPStrategy or DeepSpeedStrategy'
        )
    if launcher == 'none' and name != 'SingleDeviceStrategy':
        raise ValueError(
            f"strategy '{name}' is for several processes: start them with tools/dist_train.sh or torchrun, and "
            '--launcher pytorch'
        )
    if library == 'deepspeed':
        strategy = complete_deepspeed(strategy)
    if name == 'FSDPStrategy':
        strategy = _as_fully_shard(strategy)
    if is_type(strategy, 'DDPStrategy') and not torch.cuda.is_available():
        wrapper = dict(strategy.get('model_wrapper') or {})
        wrapper.setdefault('type', 'MMDistributedDataParallel')
        wrapper.setdefault('broadcast_buffers', False)
        wrapper.setdefault('find_unused_parameters', find_unused_parameters)
        wrapper['device_ids'] = None  # MMEngine would name a CUDA device
        strategy['model_wrapper'] = wrapper
    elif is_type(strategy, 'DDPStrategy') and find_unused_parameters:
        wrapper = dict(strategy.get('model_wrapper') or dict(type='MMDistributedDataParallel', broadcast_buffers=False))
        strategy['model_wrapper'] = {'find_unused_parameters': True, **wrapper}
    return strategy


def _as_fully_shard(strategy: dict) -> dict:
    """Turn the config of MMEngine's FSDPStrategy into ours.

    MMEngine's is torch's first FSDP. It renames and flattens parameters, and its loading of optimizers does not fit
    torch since 2.1.
    """
    wrapper = {k: v for k, v in (strategy.get('model_wrapper') or {}).items() if _SAME_WRAPPER.get(k) != v}
    if wrapper:
        name, value = next(iter(wrapper.items()))
        raise ValueError(
            f"strategy 'FSDPStrategy' runs torch's fully_shard here, which has no {name}={value!r} of "
            '`model_wrapper`. Remove it: each Transformer block is a unit. See docs/several_gpus.md'
        )
    known = accepted(FullyShardStrategy) | accepted(DDPStrategy) | {'type'}
    for name, value in strategy.items():
        if name in _SAME and name != 'model_wrapper' and value != _SAME[name]:
            reasons = {
                'state_dict_cfg': "checkpoints are gathered whole ('full'), so that any number of processes resumes",
                'skip_init_weights': 'it would leave buffers that no file holds without values',
                'activation_checkpointing': 'recompute blocks with with_cp=True of the PEFTHook instead',
            }
            raise ValueError(f"strategy 'FSDPStrategy': {name}={value!r} is not supported: {reasons[name]}")
        if name not in known and name not in _SAME:
            raise ValueError(f"strategy 'FSDPStrategy' has no option {name!r} here; see docs/several_gpus.md")
    return dict({k: v for k, v in strategy.items() if k not in _SAME}, type='FullyShardStrategy')


@STRATEGIES.register_module()
class FullyShardStrategy(DDPStrategy):
    """Shards a model over all processes by torch's ``fully_shard`` (FSDP2).

    Every Transformer block is a unit, whose parameters are gathered while it runs. The rest of the model is one more
    unit. Parameters keep their names. Frozen ones are sharded like trained ones, and have no gradients and no
    optimizer state. Packed weights (``frozen_dtype='int8'``, ``'nf4'``, ``'float8'``) are buffers, so every process
    holds them whole.

    Weights are initialised and loaded before the model is sharded. Checkpoints hold whole tensors, gathered on the
    first process, in the format of a run of one process.

    Args:
        reshard_after_forward: Whether a block frees its gathered parameters after its forward pass, and gathers them
            again for the backward pass. Defaults to True.
        **kwargs: Arguments of MMEngine's ``DDPStrategy``, without ``model_wrapper``.

    Raises:
        RuntimeError: torch is older than 2.7.

    Example:
        >>> runner_type = 'FlexibleRunner'
        >>> strategy = dict(type='FullyShardStrategy')
    """

    #: Names of tensors that checkpoints leave out, which then need not be gathered.
    left_out: Collection[str] = ()

    def __init__(self, *, reshard_after_forward: bool = True, **kwargs: Any) -> None:
        if tuple(int(n) for n in torch.__version__.split('+')[0].split('.')[:2]) < OLDEST_TORCH:
            raise RuntimeError(f'sharding by fully_shard needs torch 2.7 or newer, this is {torch.__version__}')
        super().__init__(**kwargs)
        self.reshard_after_forward = reshard_after_forward
        self._gathered: tuple[dict, dict | None] | None = None

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        """Shard the model in place."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = get_device()
        for module in model.modules():
            if isinstance(module, BaseDataPreprocessor):
                module.to(device)  # it notes the device
        model = self.convert_model(model)
        # Each unit is moved to the device by itself, so the device never holds the whole model.
        mesh = init_device_mesh(torch.device(device).type, (get_world_size(),))
        blocks = [module for module in model.modules() if family_of(module) is not None]
        for block in reversed(blocks):  # inner ones first
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        print_log(f'sharded over {get_world_size()} processes: {len(blocks)} blocks and the rest', logger='current')
        return model

    def model_state_dict(self) -> dict:
        """Return the whole tensors on the first process; on the others, an empty dictionary. All must call it."""
        if self._gathered is not None:
            return self._gathered[0]
        state = {n: _on_main_cpu(v) for n, v in self.model.state_dict().items() if n not in self.left_out}
        return state if is_main_process() else {}

    def optim_state_dict(self) -> dict:
        """Return the optimizer's state with whole tensors, in the format of one process. All must call it."""
        if self._gathered is not None and self._gathered[1] is not None:
            return self._gathered[1]
        return tree_map(_on_main_cpu, super().optim_state_dict())

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load a state with whole tensors, of any number of processes. Each process keeps its part."""
        parameters = [p for group in self.optim_wrapper.param_groups for p in group['params']]
        state = {
            index: {name: placed_like(value, parameters[index]) for name, value in slots.items()}
            for index, slots in state_dict['state'].items()
        }
        super().load_optim_state_dict({**state_dict, 'state': state})

    def load_model_state_dict(self, state_dict: dict, **kwargs: Any) -> None:
        """Refuse to load into a sharded model: MMEngine would log the mismatch and go on.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            'weights are loaded before a model is sharded, by the runner that iconformer_mm.engine.build_runner builds'
        )

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Callable | None = None,
    ) -> None:
        """Gather on all processes, and write on the first."""
        optimizer = self.optim_state_dict() if save_optimizer and hasattr(self, 'optim_wrapper') else None
        self._gathered = self.model_state_dict(), optimizer
        try:
            super().save_checkpoint(
                filename,
                save_optimizer=save_optimizer,
                save_param_scheduler=save_param_scheduler,
                extra_ckpt=extra_ckpt,
                callback=callback,
            )
        finally:
            self._gathered = None


def _on_main_cpu(value: Any) -> Any:
    """Gather a tensor, and keep it on the first process only."""
    if not isinstance(value, Tensor):
        return value
    gathered = whole(value.detach())
    return gathered.cpu() if is_main_process() else None
