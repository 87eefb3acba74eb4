"""From a config's name to a runner: what the command-line tools share."""

from __future__ import annotations

import argparse
import gc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmengine.config import Config
from mmengine.device import get_device, is_cuda_available
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from iconformer_mm.checkpoint import load_safetensors
from iconformer_mm.command_line import ConfigOptions, Parser, one_line
from iconformer_mm.compat import config_folder
from iconformer_mm.engine import CheckedRunner
from iconformer_mm.engine.bfloat16_optim_wrapper import AMP_OPTIONS, APEX_OPTIONS
from iconformer_mm.engine.hooks.adapter_checkpoint_hook import newest_intact
from iconformer_mm.registry import is_type
from iconformer_mm.tuning.methods import build_method


def make_parser(description: str) -> argparse.ArgumentParser:
    """The command line that all tools have in common."""
    parser = Parser(description=description)
    parser.add_argument('config', help='config file, or library::path such as mmpretrain::vision_transformer/...')
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and metrics')
    parser.add_argument(
        '--peft',
        metavar='METHOD',
        help='adapt the model with this PEFT method, by name (icon) or by file (configs/_base_/peft/icon.py)',
    )
    parser.add_argument('--amp', action='store_true', help='run in mixed precision; bfloat16 on a CPU')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=ConfigOptions,
        help='override settings of the config: key=value, nested keys with dots, lists as key="[a,b]"',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def find_config(name: str) -> Path:
    """Find a config file by path, or by ``library::path/in/its/configs``.

    Args:
        name: ``configs/x.py`` or ``mmpretrain::vision_transformer/x``; the
            latter with or without ``.py``.

    Raises:
        FileNotFoundError: There is no such file or library.
    """
    library, separator, inner = name.partition('::')
    if not separator:
        path = Path(name)
    else:
        try:
            path = config_folder(library) / inner
        except FileNotFoundError as error:
            raise FileNotFoundError(f"config '{name}': {error}") from None
        if path.suffix != '.py':
            path = path.with_name(path.name + '.py')
    if not path.is_file():
        raise FileNotFoundError(f"config '{name}' not found: there is no file {path}")
    return path


def load_config(name: str, peft: str | None = None) -> Config:
    """Load a config by path or as ``library::path``, composed with a PEFT method if one is given.

    Its ``work_dir`` defaults to ``work_dirs/<name of the file>``; the method's name
    takes the place of ``_full_`` in it, or follows it.

    Args:
        name: The config.
        peft: Name of a method, or a file with one such as
            ``configs/_base_/peft/icon.py``.

    Raises:
        FileNotFoundError: There is no such file or library, or none of a base.
        ValueError: The config cannot be read, the method is unknown or its file has no PEFTHook, or the library that
            the config is for is not installed.
    """
    path = find_config(name)
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config '{name}': {one_line(error)}") from error
    except Exception as error:  # a config is a program, which may fail in any way
        raise ValueError(f"config '{name}' cannot be read: {type(error).__name__}: {one_line(error)}") from error
    scope = cfg.get('default_scope')
    if scope is not None and find_spec(scope) is None:
        raise ValueError(
            f"config '{name}' is for {scope} (its default_scope), and the package {scope} is not installed"
        )
    stem = path.stem
    if peft is not None:
        add_peft(cfg, peft)
        method = Path(peft).stem if peft.endswith('.py') else peft
        stem = stem.replace('_full_', f'_{method}_') if '_full_' in stem else f'{stem}_{method}'
    if cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', stem)
    return cfg


def add_peft(cfg: Config, method: str | dict) -> None:
    """Have the runner adapt the model with a PEFT method, model config untouched.

    The hook becomes ``default_hooks.peft``, so that its options can be given
    on the command line, as ``default_hooks.peft.method.bottleneck=32``. It
    takes the place of a PEFTHook among the config's custom hooks.

    Args:
        cfg: The config.
        method: Name or config of the method, or a file with one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The method or one of its options is unknown, or the file has no PEFTHook.
    """
    if isinstance(method, str) and method.endswith('.py'):
        hook = _read_method(method)
    else:
        hook = dict(type='PEFTHook', method=dict(type=method) if isinstance(method, str) else method)
    build_method(hook.get('method', 'icon'))
    cfg.custom_hooks = [other for other in cfg.get('custom_hooks') or [] if not is_type(other, 'PEFTHook')]
    cfg.merge_from_dict({'default_hooks': {'peft': hook}})


def _read_method(path: str) -> dict:
    """The PEFTHook of a method's file."""
    hooks = Config.fromfile(find_config(path)).get('custom_hooks') or []
    found = [hook for hook in hooks if is_type(hook, 'PEFTHook')]
    if len(found) != 1:
        raise ValueError(
            f'{path} is no file of a PEFT method: it needs one PEFTHook in its `custom_hooks`, as '
            'configs/_base_/peft/icon.py has, and holds '
            f'{len(found)}'
        )
    return found[0]


def use_amp(cfg: Config) -> None:
    """Have training run in mixed precision: float16 with loss scaling on a GPU, bfloat16 on a CPU.

    Args:
        cfg: The config. Of its optimizer wrapper all is kept that is not about another precision.

    Raises:
        ValueError: The config has no optimizer wrapper, or several.
    """
    optim_wrapper = cfg.get('optim_wrapper')
    if not isinstance(optim_wrapper, dict) or 'optimizer' not in optim_wrapper:
        raise ValueError('--amp: the config has no single `optim_wrapper` with an optimizer to run in mixed precision')
    kept = AMP_OPTIONS if is_cuda_available() else ()
    for name in set(AMP_OPTIONS + APEX_OPTIONS).difference(kept):
        optim_wrapper.pop(name, None)
    if not kept:
        optim_wrapper['type'] = 'BFloat16OptimWrapper'
        return
    optim_wrapper['type'] = 'AmpOptimWrapper'
    scale = optim_wrapper.get('loss_scale')
    # MMEngine takes no integer.
    optim_wrapper['loss_scale'] = 'dynamic' if scale is None else float(scale) if isinstance(scale, int) else scale


def check_precision(cfg: Config) -> None:
    """Refuse a training in mixed precision that needs a GPU where there is none.

    Raises:
        ValueError: MMEngine's wrapper for it would not run here.
    """
    if is_type(cfg.get('optim_wrapper') or {}, 'AmpOptimWrapper') and get_device() in ('cpu', 'mps'):
        raise ValueError(
            "the config trains in mixed precision on a GPU (optim_wrapper.type is 'AmpOptimWrapper'), and there is "
            'none: add --amp, which takes bfloat16 on a CPU, or set optim_wrapper.type=BFloat16OptimWrapper'
        )


def _complete_mmpretrain_dataloaders(cfg: Config) -> None:
    """MMPretrain's configs count on their tools to say how a batch is collated."""
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        if cfg.get(name) is not None:
            loader = cfg[name]
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', torch.cuda.is_available())
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def _replace_sync_bn(node: Any) -> None:
    """SyncBN runs on GPUs only; within one process MMEngine makes it BN, too."""
    if isinstance(node, dict):
        if is_type(node, 'SyncBN', 'MMSyncBN', 'SyncBatchNorm'):
            node['type'] = 'BN'
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            _replace_sync_bn(child)


def _take_seed_of_resumed(cfg: Config) -> None:
    """A run whose seed was drawn by lot goes on with it; MMEngine would read it after the data loaders are built."""
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    randomness = cfg.get('randomness') or {}
    if not cfg.get('resume') or not is_type(hook, 'AdapterCheckpointHook') or randomness.get('seed') is not None:
        return
    path = cfg.get('load_from')
    if path is None:
        folder = Path(hook['out_dir']) / Path(cfg.work_dir).name if hook.get('out_dir') else Path(cfg.work_dir)
        path, _ = newest_intact(folder, HOOKS.build(hook).filename_tmpl)
    if path is not None and str(path).endswith('.safetensors'):
        cfg.randomness = dict(randomness, seed=load_safetensors(str(path))['meta'].get('seed'))


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner; on machines without a GPU also a distributed one."""
    _take_seed_of_resumed(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        _complete_mmpretrain_dataloaders(cfg)
    if cfg.get('launcher', 'none') == 'pytorch' and not torch.cuda.is_available():
        # MMEngine selects a CUDA device, whatever the backend, unless the
        # process group is there already.
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
        _replace_sync_bn(cfg.model)
        if cfg.get('model_wrapper_cfg') is None:
            cfg.model_wrapper_cfg = dict(
                type='MMDistributedDataParallel',
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=cfg.get('find_unused_parameters', False),
            )
    return CheckedRunner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)


def leave_process_group() -> None:
    """Take the process group down once all of its processes are done; without one, nothing.

    A process that ends while another still talks to it can abort, and a run
    that had finished its work would be reported as failed.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # a wrapped model holds the group, too
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
