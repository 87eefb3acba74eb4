"""Differences between the OpenMMLab distributions that share one set of import names, and between releases of torch."""

from __future__ import annotations

import functools
import importlib
import itertools
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode


def config_folder(library: str) -> Path:
    """The folder with the configs of a library: in its package, or, for a checkout of ours, beside it.

    Args:
        library: Import name, e.g. ``'mmdet'``.

    Raises:
        FileNotFoundError: The library is not installed.
    """
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f'the package {library} is not installed')
    package = Path(spec.submodule_search_locations[0])
    inside = package / '.mim' / 'configs'
    return package.parent / 'configs' if library == 'iconformer_mm' and not inside.is_dir() else inside


_get_cfg_path = Config._get_cfg_path


def _find_base(name: str, filename: str) -> tuple[str, str | None]:
    """MMEngine's look-up of a base config, but for ours.

    MMEngine would have all types of a base looked up in the scope that the
    library is named after; those of our configs are in their ``default_scope``.
    """
    library, separator, inner = name.partition('::')
    if not separator:
        return _get_cfg_path(name, filename)
    if library == 'iconformer_mm':
        return str(config_folder(library) / inner), None
    if find_spec(library) is None:
        raise FileNotFoundError(f"{filename} has the base '{name}', and the package {library} is not installed")
    path = config_folder(library) / inner
    # MMEngine would first read all metafiles of the library, which takes longer than all the rest of a config.
    return (str(path), library) if path.is_file() else _get_cfg_path(name, filename)


def map_config_packages() -> None:
    """Let ``_base_ = 'mmseg::...'`` find the installed package, whichever distribution it came with, and ours.

    MMEngine looks such a config up by the distribution's name, and takes a
    library for missing (or installs the original over it) when another
    distribution provides it.
    """
    Config._get_cfg_path = staticmethod(_find_base)
    MODULE2PACKAGE['iconformer_mm'] = 'iconformer_mm'
    for module, distribution in list(MODULE2PACKAGE.items()):
        if module != distribution and find_spec(module) is not None:
            try:
                metadata.distribution(distribution)
            except metadata.PackageNotFoundError:
                MODULE2PACKAGE[module] = module


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's first parameter, else of its first buffer, else the CPU.

    A quantised module has no parameters: its weights are packed, and on the CPU.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    return next((tensor.device for tensor in tensors), torch.device('cpu'))


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: of its first floating-point parameter or buffer, else the default one.

    Floats of eight bits are for keeping weights, not for computing.
    """
    tensors = itertools.chain(module.parameters(), module.buffers())
    computing = (t.dtype for t in tensors if t.is_floating_point() and t.element_size() > 1)
    return next(computing, torch.get_default_dtype())


def is_autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; torch before 2.4 asks a function for each."""
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:
        return torch.is_autocast_cpu_enabled() if device == 'cpu' else torch.is_autocast_enabled()


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast computes in on a device type, None where it is off; for torch 2.4 or newer."""
    return torch.get_autocast_dtype(device) if is_autocast_enabled(device) else None


# Whether torch.compile is at work; torch 2.1 has it under another name.
is_compiling: Callable[[], bool] = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling
# Whether torch.export is; older releases, torch 2.1 among them, do not tell.
is_exporting: Callable[[], bool] = getattr(torch.compiler, 'is_exporting', bool)


def left_to_python(function: Callable) -> Callable:
    """Keep torch 2.1's compiler out of a function and of all that it calls; it cannot follow what a thread keeps.

    Later releases compile the function.
    """
    is_old = torch.__version__.startswith('2.1.')
    return torch._dynamo.disable(function) if is_old else function


# Operators of mmcv that read the memory of a map as if it were contiguous, by module.
_MAP_READERS = {
    'roi_align': 'RoIAlignFunction',
    'roi_align_rotated': 'RoIAlignRotatedFunction',
    'roi_pool': 'RoIPoolFunction',
    'prroi_pool': 'PrRoIPoolFunction',
    'deform_roi_pool': 'DeformRoIPoolFunction',
    'border_align': 'BorderAlignFunction',
    'carafe': 'CARAFEFunction',
    'modulated_deform_conv': 'ModulatedDeformConv2dFunction',
}


def read_maps_in_order() -> None:
    """Let the operators of mmcv, where they are installed, read maps of any memory format.

    Maps of a plain ViT are often in channels_last, and convolutions keep that. mmcv reads their values in the wrong
    order, without an error (https://github.com/open-mmlab/mmcv/issues/2203), so that RoI heads learn nothing.
    """
    # They are imported here, since a head may be made after its backbone is adapted. This takes 40 ms.
    try:
        importlib.import_module('mmcv.ops')
    except ImportError:  # mmcv-lite, or an environment without compiled operators
        return
    for module, name in _MAP_READERS.items():
        function = getattr(sys.modules.get(f'mmcv.ops.{module}'), name, None)
        if function is not None and not hasattr(function.forward, 'in_order'):
            function.forward = staticmethod(_in_order(function.forward))


def _in_order(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def run(ctx: Any, *args: Any) -> Any:
        return forward(ctx, *(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args))

    run.in_order = True  # type: ignore[attr-defined]
    return run


# In torch.autograd.grad with is_grads_batched; the name is read here, since that takes a while.
_BATCHED = torch._C._dispatch_key_parse('VmapMode')
_is_included = torch._C._dispatch_tls_is_dispatch_key_included


def is_transformed() -> bool:
    """Whether something is at work that looks into operators, and so knows only torch's own.

    These are the transforms of ``torch.func``, forward-mode AD, and batched gradients.
    """
    return not is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0 or _is_included(_BATCHED)
    )


def is_plain(*tensors: Tensor) -> bool:
    """Whether only autograd and autocast see the operators on tensors, which are what lies in their memory.

    Not so under a compiler, a tracer, a dispatch mode, or what :func:`is_transformed` names.
    """
    if is_compiling() or is_transformed() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    for tensor in tensors:
        if type(tensor) not in (Tensor, Parameter) or not (tensor.is_cpu or tensor.is_cuda) or tensor.is_neg():
            return False
    return True
