"""Configs: found, read, composed with a PEFT method, and asked what they say."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device, is_cuda_available
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from iconformer_mm.compat import config_folder
from iconformer_mm.messages import one_line
from iconformer_mm.registry import accepted, is_type
from iconformer_mm.tuning.methods import build_method

from .bfloat16_optim_wrapper import AMP_OPTIONS, APEX_OPTIONS


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
    replaced = [id(other) for other in peft_hooks(cfg)]
    cfg.custom_hooks = [other for other in cfg.get('custom_hooks') or [] if id(other) not in replaced]
    cfg.merge_from_dict({'default_hooks': {'peft': hook}})


def _read_method(path: str) -> dict:
    """The PEFTHook of a method's file."""
    found = peft_hooks(Config.fromfile(find_config(path)))
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


def peft_hooks(cfg: Config) -> list[Any]:
    """The PEFTHooks of a config, among its custom and its default hooks; one that is built already is as it is.

    Args:
        cfg: The config.
    """
    hooks = [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]
    return [hook for hook in hooks if hook and is_type(hook, 'PEFTHook')]


def method_of(cfg: Config) -> dict[str, Any] | None:
    """Arguments for :func:`iconformer_mm.inject`, of a config's PEFTHook; None if it has none."""
    for hook in peft_hooks(cfg):
        if not isinstance(hook, Mapping):  # built already
            hook = {name: getattr(hook, name) for name in accepted(type(hook))}
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
        if node.get('checkpoint') and is_type(node, 'TIMMFeatures', 'ICoNTIMMFeatures'):
            return True
        if node.get('checkpoint_path') or node.get('pretrained', _timm_default(node.get('type'))):
            return True
        pretrained = any(is_type(init, 'Pretrained', 'PretrainedInit') for init in inits if init)
        return pretrained or any(map(names_weights, node.values()))
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


def build_model(cfg: Config) -> BaseModel:
    """The model of a config, on one process, without its pre-trained weights."""
    init_default_scope(cfg.default_scope)
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:  # MMPretrain's stands beside the model
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return revert_sync_batchnorm(MODELS.build(model))
