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
from mmengine.dist import init_dist
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner

from iconformer_mm.checkpoint import DamagedFileError, load_safetensors
from iconformer_mm.checkpoint.filename_template import FilenameTemplate
from iconformer_mm.checkpoint.reading import guard_loading
from iconformer_mm.checkpoint.safetensors_io import expanded
from iconformer_mm.checkpoint.training_checkpoint import is_seed
from iconformer_mm.cli.parser import ConfigOptions, Parser
from iconformer_mm.compat import config_folder
from iconformer_mm.engine import CheckedRunner, WeightsHook
from iconformer_mm.engine.bfloat16_optim_wrapper import AMP_OPTIONS, APEX_OPTIONS
from iconformer_mm.engine.hooks.adapter_checkpoint_hook import newest_intact, on_main_process
from iconformer_mm.messages import one_line
from iconformer_mm.registry import is_type
from iconformer_mm.tuning.methods import build_method

TRUST = '--trust-checkpoints'


def make_parser(description: str) -> argparse.ArgumentParser:
    """The command line that all tools have in common."""
    parser = Parser(description=description)
    parser.add_argument('config', help='config file, or library::path such as mmpretrain::vision_transformer/...')
    parser.add_argument('--work-dir', type=os.path.expanduser, help='folder for logs, checkpoints and metrics')
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
    parser.add_argument(
        TRUST, action='store_true', help='unpickle checkpoints (.pth) even if that could execute code in them'
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def add_base(parser: argparse.ArgumentParser) -> None:
    """The option of the tools that resume or test: the base of an adapter checkpoint."""
    parser.add_argument(
        '--base',
        type=os.path.expanduser,
        help='checkpoint of the base weights, where an adapter checkpoint is resumed or tested whose run began with '
        "load_from (default: the config's load_from)",
    )


def load_by_command_line(cfg: Config, args: argparse.Namespace, checkpoint: str | None) -> None:
    """Have a checkpoint loaded in place of the config's ``load_from``, which remains the base.

    A base that only a checkpoint names is not opened. So what the config or ``--base`` names is handed to the
    AdapterCheckpointHook.

    Args:
        cfg: The config.
        args: The command line, with the options of :func:`add_base`.
        checkpoint: The checkpoint; None for the newest of the run.

    Raises:
        ValueError: There is a ``--base``, and the config has no AdapterCheckpointHook to take it.
    """
    options = args.cfg_options or {}
    base = args.base or options.pop('load_from', None) or cfg.get('load_from')
    cfg.load_from = checkpoint
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    hook_type = options.get('default_hooks.checkpoint.type', hook.get('type'))
    if getattr(hook_type, '__name__', hook_type) == 'AdapterCheckpointHook':
        if base is not None and (args.base or hook.get('base') is None):
            cfg.merge_from_dict({'default_hooks.checkpoint.base': base})
    elif args.base is not None:
        raise ValueError(
            '--base is for checkpoints of the AdapterCheckpointHook, which the config does not have '
            "(default_hooks.checkpoint.type); a checkpoint of MMEngine's CheckpointHook holds the base"
        )


def guard(args: argparse.Namespace) -> None:
    """Read no checkpoint in this process that could execute code, unless ``--trust-checkpoints`` says so."""
    guard_loading(args.trust_checkpoints, f'add {TRUST}')


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
    _join_process_group(cfg)
    folder = expanded(hook['out_dir']) / Path(cfg.work_dir).name if hook.get('out_dir') else Path(cfg.work_dir)
    template = FilenameTemplate(HOOKS.build(hook).filename_tmpl)
    seed = on_main_process(lambda: _seed_of(cfg.get('load_from') or newest_intact(folder, template)[0]))
    if seed is not None:
        cfg.randomness = dict(randomness, seed=seed)


def _seed_of(path: str | os.PathLike | None) -> int | None:
    """The seed of an adapter checkpoint; None where there is none."""
    if path is None or not str(path).endswith('.safetensors'):
        return None
    seed = load_safetensors(str(path)).get('meta', {}).get('seed')
    if seed is not None and not is_seed(seed):
        raise DamagedFileError(f'{path} is no intact training checkpoint: its `seed` is none')
    return seed


def _join_process_group(cfg: Config) -> None:
    """Meet the other processes of a distributed run, as MMEngine's runner would later."""
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or torch.distributed.is_initialized():
        return
    if launcher == 'pytorch' and not torch.cuda.is_available():
        # MMEngine would select a CUDA device, whatever the backend.
        torch.distributed.init_process_group('gloo')
    else:
        init_dist(launcher, **((cfg.get('env_cfg') or {}).get('dist_cfg') or {}))


def build_runner(cfg: Config) -> Runner:
    """Build the config's runner; on machines without a GPU also a distributed one.

    A runner without a PEFTHook is given a :class:`iconformer_mm.engine.WeightsHook`.

    Args:
        cfg: The config.
    """
    _take_seed_of_resumed(cfg)
    if cfg.get('default_scope') == 'mmpretrain':
        _complete_mmpretrain_dataloaders(cfg)
    if cfg.get('launcher', 'none') == 'pytorch' and not torch.cuda.is_available():
        _join_process_group(cfg)
        _replace_sync_bn(cfg.model)
        if cfg.get('model_wrapper_cfg') is None:
            cfg.model_wrapper_cfg = dict(
                type='MMDistributedDataParallel',
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=cfg.get('find_unused_parameters', False),
            )
    runner = CheckedRunner.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    if not hasattr(runner, 'strategy') and not any(isinstance(hook, WeightsHook) for hook in runner.hooks):
        runner.register_hook(WeightsHook())  # PEFTHook is one, too
    return runner


def leave_process_group() -> None:
    """Take the process group down once all of its processes are done; without one, nothing.

    A process that ends while another still talks to it can abort, and a run
    that had finished its work would be reported as failed.
    """
    if torch.distributed.is_initialized():
        gc.collect()  # a wrapped model holds the group, too
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
