"""Building a runner from a config."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.dist import init_dist
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from iconformer_mm.checkpoint import DamagedFileError, load_safetensors
from iconformer_mm.checkpoint.filename_template import FilenameTemplate
from iconformer_mm.checkpoint.training_checkpoint import is_seed
from iconformer_mm.files import expanded
from iconformer_mm.registry import is_type

from .config import check_text_encoder
from .flexible_runner import CheckedFlexibleRunner
from .hooks import WeightsHook
from .hooks.adapter_checkpoint_hook import newest_intact, on_main_process
from .runner import CheckedRunner


def _complete_mmpretrain_dataloaders(cfg: Config) -> None:
    """Set the collate function and other defaults that MMPretrain's own tools would set."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name) is not None:
            loader = cfg[name]
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', torch.cuda.is_available())
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def _replace_sync_bn(node: Any) -> None:
    """Replace SyncBN, which runs only on GPUs, by BN. MMEngine does this, too, for a single process."""
    if isinstance(node, dict):
        if is_type(node, 'SyncBN', 'MMSyncBN', 'SyncBatchNorm'):
            node['type'] = 'BN'
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            _replace_sync_bn(child)


def _take_seed_of_resumed(cfg: Config) -> None:
    """Take a randomly drawn seed from the checkpoint to resume. MMEngine reads it after it builds the data loaders."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    randomness = cfg.get('randomness') or {}
    if not cfg.get('resume') or not is_type(hook, 'AdapterCheckpointHook') or randomness.get('seed') is not None:
        return
    _join_process_group(cfg)
    folder = expanded(hook['out_dir']) / Path(cfg.work_dir).name if hook.get('out_dir') else Path(cfg.work_dir)
    template = FilenameTemplate(HOOKS.build(hook).filename_tmpl)
    seed = on_main_process(lambda: _seed_of(cfg.get('load_from') or newest_intact(folder, template)[0]))
    if seed is not None:
        cfg.randomness = dict(randomness, seed=seed)


def _seed_of(path: str | os.PathLike | None) -> int | None:
    """Return the seed of an adapter checkpoint, or None."""
    if path is None or not str(path).endswith('.safetensors'):
        return None
    seed = load_safetensors(str(path)).get('meta', {}).get('seed')
    if seed is not None and not is_seed(seed):
        raise DamagedFileError(
            f'{path} is not a valid training checkpoint: its `seed` is not an integer from 0 to 2**32 - 1'
        )
    return seed


def _is_restarted() -> bool:
    """Whether torchrun, on one machine, has started this process again after another one died."""
    count = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
    return count != '0' and os.environ.get('GROUP_WORLD_SIZE') == '1'


def _group_arguments() -> dict[str, Any]:
    """Return the arguments of ``init_process_group``.

    The agent of torchrun 2.5 and newer keeps one store for all restarts. A restarted process can read the address of a
    dead one there, and then fails. It gets a part of the store that only its restart uses.
    """
    if not _is_restarted():
        return {}
    store, rank, world_size = next(iter(torch.distributed.rendezvous('env://')))
    name = f'restart_{os.environ["TORCHELASTIC_RESTART_COUNT"]}'
    return dict(store=torch.distributed.PrefixStore(name, store), rank=rank, world_size=world_size)


def _join_process_group(cfg: Config) -> None:
    """Join the process group of a distributed run, as MMEngine's runner would do later."""
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or torch.distributed.is_initialized():
        return
    if launcher == 'pytorch' and not torch.cuda.is_available():
        # MMEngine would select a CUDA device for any backend.
        torch.distributed.init_process_group('gloo', **_group_arguments())
    else:
        arguments = _group_arguments() if launcher == 'pytorch' else {}
        init_dist(launcher, **((cfg.get('env_cfg') or {}).get('dist_cfg') or {}), **arguments)


def _is_flexible(cfg: Config) -> bool:
    """Whether a config asks for MMEngine's FlexibleRunner."""
    return is_type(dict(type=cfg.get('runner_type')), 'FlexibleRunner', 'CheckedFlexibleRunner')


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner. Distributed runners work on machines without a GPU, too.

    ``runner_type='FlexibleRunner'`` gives a :class:`~iconformer_mm.engine.CheckedFlexibleRunner`. A runner without a
    PEFTHook gets a :class:`iconformer_mm.engine.WeightsHook`.

    Args:
        cfg: The config.

    Raises:
        MissingExtraError: The model reads text, and transformers is not installed.
        ValueError: transformers is too new for the model.
    """
    check_text_encoder(cfg.get('model'))
    _take_seed_of_resumed(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        _complete_mmpretrain_dataloaders(cfg)
    is_on_cpus = cfg.get('launcher', 'none') == 'pytorch' and not torch.cuda.is_available()
    if is_on_cpus or _is_restarted():
        _join_process_group(cfg)
    if is_on_cpus:
        _replace_sync_bn(cfg.model)
        if cfg.get('model_wrapper_cfg') is None and not _is_flexible(cfg):
            cfg.model_wrapper_cfg = dict(
                type='MMDistributedDataParallel',
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=cfg.get('find_unused_parameters', False),
            )
    if _is_flexible(cfg):
        runner = CheckedFlexibleRunner.from_cfg(cfg)
    else:
        runner = CheckedRunner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    if not any(isinstance(hook, WeightsHook) for hook in runner.hooks):
        runner.register_hook(WeightsHook())  # PEFTHook is a subclass
    return runner


def exempt_from_collection() -> None:
    """Exempt all that is in memory from garbage collection. Call it once, before the work of a process begins.

    MMEngine collects garbage for every data set that it builds. With the libraries imported that takes a second each.
    """
    gc.freeze()


def leave_process_group() -> None:
    """Destroy the process group, if there is one, after all its processes are done.

    If a process exits while another still communicates with it, the other can abort. A
    run that had finished its work would then be reported as failed.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # a wrapped model also holds the group
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
