"""Finding, reading and querying configs, and composing them with a PEFT method."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device, is_cuda_available
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner

from iconformer_mm.compat import config_folder
from iconformer_mm.extras import require_extra
from iconformer_mm.messages import hint, one_line
from iconformer_mm.registry import accepted, is_type
from iconformer_mm.tuning.methods import build_method

from .bfloat16_optim_wrapper import AMP_OPTIONS, APEX_OPTIONS

# Read from a config by the runner's relatives, not by its constructor.
_MORE_SETTINGS = (
    'auto_scale_lr',
    'compile',
    'custom_imports',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'strategy',
    'test_pipeline',
    'train_pipeline',
    'tta_model',
    'tta_pipeline',
)


def find_config(name: str) -> Path:
    """Find a config file by path, or by ``library::path/in/its/configs``.

    Args:
        name: ``configs/x.py`` or ``mmpretrain::vision_transformer/x``. The
            suffix ``.py`` is optional in the latter.

    Raises:
        FileNotFoundError: The file or the library does not exist.
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
    """Load a config by path or as ``library::path``, and compose it with a PEFT method.

    Its ``work_dir`` defaults to ``work_dirs/<name of the file>``. The method's name replaces
    ``_full_`` in that name, or is appended to it.

    Args:
        name: The config.
        peft: Name of a PEFT method, or a file with a method such as
            ``configs/_base_/peft/icon.py``. Defaults to None, no method.

    Raises:
        FileNotFoundError: The file, the library or a base config does not exist.
        ValueError: The config cannot be read, the method is unknown, the method's file has no PEFTHook, or the
            library that the config needs is not installed.
    """
    path = find_config(name)
    try:
        cfg = Config.fromfile(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"config '{name}': {one_line(error)}") from error
    except Exception as error:  # a config is a program that can fail in any way
        raise ValueError(f"config '{name}' cannot be read: {type(error).__name__}: {one_line(error)}") from error
    _check_settings(cfg, name)
    scope = cfg.get('default_scope')
    if scope is not None and find_spec(scope) is None:
        raise ValueError(
            f"config '{name}' is for {scope} (its default_scope), but the package {scope} is not installed"
        )
    stem = path.stem
    if peft is not None:
        add_peft(cfg, peft)
        method = Path(peft).stem if peft.endswith('.py') else peft
        stem = stem.replace('_full_', f'_{method}_') if '_full_' in stem else f'{stem}_{method}'
    if cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', stem)
    return cfg


def runner_settings() -> set[str]:
    """The settings of a config that MMEngine's runner and the tools read."""
    return {*inspect.signature(Runner.__init__).parameters, *_MORE_SETTINGS} - {'self', 'cfg'}


def merge_options(cfg: Config, options: dict[str, Any] | None, source: str = '--cfg-options') -> None:
    """Override settings of a config, as ``--cfg-options`` does.

    Args:
        cfg: The config.
        options: Values by dotted names; None for none.
        source: Where the options stand, for messages.

    Raises:
        ValueError: A name is probably misspelt, or stands for nothing that can be set.
    """
    if not options:
        return
    known = runner_settings() | {*cfg}
    for name in options:
        _check_name(cfg, name, known, source)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f'{source} {" ".join(options)}: {one_line(error)}') from error


def _check_name(cfg: Config, name: str, known: Iterable[str], source: str) -> None:
    """Refuse a name that would be taken by nobody.

    What a class is given is checked where it is built. Here is what nobody would look at: settings beside those of the
    runner, and keys of plain dictionaries that differ in a letter from one that is there.
    """
    first, *rest = name.split('.')
    if first not in known:
        raise ValueError(f"{source} {name}: there is no setting '{first}'{hint(first, known)}")
    node = cfg.get(first)
    for index, key in enumerate(rest):
        if isinstance(node, (list, tuple)):
            if not key.isdigit() or int(key) >= len(node):
                raise ValueError(f"{source} {name}: '{key}' is none of the {len(node)} items, 0 to {len(node) - 1}")
            node = node[int(key)]
            continue
        if not isinstance(node, dict):
            return
        last = index == len(rest) - 1
        if key not in node:
            near = hint(key, node, cutoff=0.8)
            if near and not (last and 'type' in node):
                raise ValueError(f"{source} {name}: there is no '{key}'{near}")
            return
        node = node[key]


def _check_settings(cfg: Config, name: str) -> None:
    """Refuse a misspelt setting: nobody would read it, and the default or the base config's would hold.

    A config may have variables of its own. One that is nearly a setting's name is taken for a misspelt one.

    Raises:
        ValueError: There is one.
    """
    known = runner_settings()
    for key in set(cfg.keys()) - known:
        near = next((other for other in known if _is_misspelt(key, other)), None)
        if near is not None:
            raise ValueError(
                f"config '{name}': nobody reads the setting '{key}' (did you mean '{near}'?). If it is a variable of "
                'yours, give it a name that is not so near'
            )


def _is_misspelt(name: str, setting: str) -> bool:
    """Whether a name differs from a setting's in a letter or two; numbered variants of a setting do not count."""
    if name[-1:].isdigit() or not name.isascii():
        return False
    swapped = (setting[:i] + setting[i + 1] + setting[i] + setting[i + 2 :] for i in range(len(setting) - 1))
    return difflib.SequenceMatcher(None, name, setting).ratio() >= 0.92 or name in swapped


def add_peft(cfg: Config, method: str | dict | list[dict]) -> None:
    """Add a PEFTHook to a config. The model's config does not change.

    The hook becomes ``default_hooks.peft``, so its options can be set on the command
    line, e.g. ``default_hooks.peft.method.bottleneck=32``. It replaces any PEFTHook in
    the config's custom hooks.

    Args:
        cfg: The config, changed in place.
        method: Name or config of the method, or a file with a method. A list has a method for each module, as
            :func:`iconformer_mm.inject` takes them as ``methods``.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The method or one of its options is unknown, or the file does not have exactly one PEFTHook.
    """
    if isinstance(method, str) and method.endswith('.py'):
        hook = _read_method(method)
    elif isinstance(method, list):
        hook = dict(type='PEFTHook', methods=method)
    else:
        hook = dict(type='PEFTHook', method=dict(type=method) if isinstance(method, str) else method)
    if hook.get('methods') is None:  # those of several modules are built with the model
        build_method(hook.get('method') or 'icon')
    replaced = [id(other) for other in peft_hooks(cfg)]
    cfg.custom_hooks = [other for other in cfg.get('custom_hooks') or [] if id(other) not in replaced]
    cfg.merge_from_dict({'default_hooks': {'peft': hook}})


def _read_method(path: str) -> dict:
    """Read the PEFTHook of a method's file."""
    found = peft_hooks(Config.fromfile(find_config(path)))
    if len(found) != 1:
        raise ValueError(
            f'{path} is not a file of a PEFT method: it must have exactly one PEFTHook in `custom_hooks`, like '
            f'configs/_base_/peft/icon.py, and has {len(found)}'
        )
    return found[0]


def use_amp(cfg: Config) -> None:
    """Set a config to train in mixed precision: float16 with loss scaling on a GPU, bfloat16 on a CPU.

    Args:
        cfg: The config, changed in place. Options of its optimizer wrapper for another precision are removed.

    Raises:
        ValueError: The config has no optimizer wrapper, or several.
    """
    optim_wrapper = cfg.get('optim_wrapper')
    if not isinstance(optim_wrapper, dict) or 'optimizer' not in optim_wrapper:
        raise ValueError('--amp: the config needs a single `optim_wrapper` with an optimizer for mixed precision')
    kept = AMP_OPTIONS if is_cuda_available() else ()
    for name in set(AMP_OPTIONS + APEX_OPTIONS).difference(kept):
        optim_wrapper.pop(name, None)
    if not kept:
        optim_wrapper['type'] = 'BFloat16OptimWrapper'
        return
    optim_wrapper['type'] = 'AmpOptimWrapper'
    scale = optim_wrapper.get('loss_scale')
    # MMEngine does not accept integers.
    optim_wrapper['loss_scale'] = 'dynamic' if scale is None else float(scale) if isinstance(scale, int) else scale


def check_precision(cfg: Config) -> None:
    """Reject mixed-precision training that needs a GPU on a machine without one.

    Args:
        cfg: The config.

    Raises:
        ValueError: MMEngine's AmpOptimWrapper cannot run on this machine.
    """
    if is_type(cfg.get('optim_wrapper') or {}, 'AmpOptimWrapper') and get_device() in ('cpu', 'mps'):
        raise ValueError(
            "the config trains in mixed precision on a GPU (optim_wrapper.type is 'AmpOptimWrapper'), but there is no "
            'GPU: add --amp, which uses bfloat16 on a CPU, or set optim_wrapper.type=BFloat16OptimWrapper'
        )


def check_text_encoder(model: Any) -> None:
    """Reject a detector that reads text if MMDetection cannot run its text encoder.

    Args:
        model: The config of the model.

    Raises:
        MissingExtraError: transformers is not installed.
        ValueError: transformers is too new for this MMDetection.
    """
    kind = next((name for name in ('GLIP', 'GroundingDINO') if is_type(model or {}, name)), None)
    if kind is None:
        return
    require_extra('text', f'the text encoder of {kind}')
    # MMDetection goes on without what it cannot import, and its layers lack the later arguments of those they replace.
    is_too_new = not hasattr(import_module('transformers').PreTrainedTokenizerBase, 'batch_encode_plus')
    if kind == 'GLIP':
        attention = import_module('mmdet.models.utils.vlfuse_helper').HFBertAttention
        is_too_new |= attention is object or 'cache_position' in inspect.signature(attention.forward).parameters
    if is_too_new:
        raise ValueError(
            f'MMDetection cannot run {kind} with transformers {version("transformers")}, which has changed too much: '
            "pip install 'transformers>=4.40,<4.50'"
        )


def peft_hooks(cfg: Config) -> list[Any]:
    """List the PEFTHooks among a config's custom and default hooks, as configs or as built hooks.

    Args:
        cfg: The config.
    """
    hooks = [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]
    return [hook for hook in hooks if hook and is_type(hook, 'PEFTHook')]


# Arguments of the PEFTHook that concern the run, not the model.
_NOT_INJECTED = ('type', 'save_adapter', 'prefix_cache', 'priority')


def method_of(cfg: Config) -> dict[str, Any] | None:
    """Return the arguments of a config's PEFTHook for :func:`iconformer_mm.inject`, or None if it has no PEFTHook."""
    for hook in peft_hooks(cfg):
        if not isinstance(hook, Mapping):  # already built
            hook = {name: getattr(hook, name) for name in accepted(type(hook))}
        return {key: value for key, value in hook.items() if key not in _NOT_INJECTED}
    return None


def names_weights(node: Any) -> bool:
    """Whether a model's config names pre-trained weights.

    Args:
        node: The model's config, or a part of it.
    """
    if isinstance(node, Mapping):
        inits = node.get('init_cfg') or []
        inits = inits if isinstance(inits, (list, tuple)) else [inits]
        # In older configs of MMSegmentation, `pretrained` is a name. For timm's models it is a flag, whose default
        # differs between libraries; they also have `checkpoint_path`.
        if node.get('checkpoint') and is_type(node, 'TIMMFeatures', 'ICoNTIMMFeatures'):
            return True
        if node.get('checkpoint_path') or node.get('pretrained', _timm_default(node.get('type'))):
            return True
        pretrained = any(is_type(init, 'Pretrained', 'PretrainedInit') for init in inits if init)
        return pretrained or any(map(names_weights, node.values()))
    return isinstance(node, (list, tuple)) and any(map(names_weights, node))


def _timm_default(kind: Any) -> bool:
    """Whether a backbone is one of timm's that loads pre-trained weights by default."""
    if not str(getattr(kind, '__name__', kind)).endswith('TIMMBackbone'):
        return False
    built = MODELS.get(kind) if isinstance(kind, str) else kind
    option = inspect.signature(built.__init__).parameters.get('pretrained') if built is not None else None
    # Our classes pass their arguments on to their bases.
    if option is None and built is not None:
        option = next(
            (found for base in built.__mro__ if (found := inspect.signature(base).parameters.get('pretrained'))), None
        )
    return option is not None and option.default is True


def build_model(cfg: Config) -> BaseModel:
    """Build the model of a config for one process, without its pre-trained weights.

    Raises:
        MissingExtraError: It reads text, and transformers is not installed.
        ValueError: transformers is too new for it.
    """
    check_text_encoder(cfg.model)
    init_default_scope(cfg.default_scope)
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:  # MMPretrain's configs have it outside the model
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return revert_sync_batchnorm(MODELS.build(model))
