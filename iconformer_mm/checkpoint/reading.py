"""Checkpoints of other programs (``.pth``), read without executing anything in them.

MMEngine's own loader unpickles a file that torch's ``weights_only`` refuses. Here that is an error. An allowlist names
what MMEngine's training checkpoints hold besides tensors: their logs and NumPy values. Nothing else is resolved.
"""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import tarfile
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner import checkpoint as loaders
from mmengine.utils import digit_version
from torch import Tensor

from iconformer_mm.files import expanded

from .loading import load_safetensors
from .safetensors_io import DamagedFileError, shortened


class _History(HistoryBuffer):
    """Becomes a HistoryBuffer with the statistics of its class, whatever the file says."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update((name, state[name]) for name in ('max_length', '_log_history', '_count_history'))
        self.__class__ = HistoryBuffer


def _statistic(kind: Any, name: Any) -> None:
    """Replaces ``getattr``, which a pickled HistoryBuffer uses to look up its statistics. It finds nothing."""


# What a pickle may name besides tensors, by the names used in files. None of it runs code from the file.
_NAMES: dict[str, Any] = {
    'mmengine.logging.history_buffer.HistoryBuffer': _History,
    'builtins.getattr': _statistic,
    '__builtin__.getattr': _statistic,
    'argparse.Namespace': argparse.Namespace,
    'numpy.ndarray': np.ndarray,
    'numpy.dtype': np.dtype,
    '_codecs.encode': import_module('_codecs').encode,
    **{f'numpy.dtypes.{name}': kind for name, kind in vars(np.dtypes).items() if name.endswith('DType')},
}
_CORE = import_module('numpy._core.multiarray' if hasattr(np, '_core') else 'numpy.core.multiarray')
for _name in ('_reconstruct', 'scalar'):
    for _core in ('core', '_core'):  # NumPy 1 and 2
        _NAMES[f'numpy.{_core}.multiarray.{_name}'] = getattr(_CORE, _name)
# What torch's own weights_only allows.
_OF_TORCH: dict[str, Any] = {
    'collections.OrderedDict': collections.OrderedDict,
    'collections.Counter': collections.Counter,
    'builtins.set': set,
    'torch.Size': torch.Size,
    'torch.device': torch.device,
    'torch.Tensor': Tensor,
    'torch.nn.parameter.Parameter': torch.nn.Parameter,
    'torch._utils._rebuild_parameter': torch._utils._rebuild_parameter,
    'torch._utils._rebuild_tensor': torch._utils._rebuild_tensor,
    'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
    **{f'torch.{name}': kind for name, kind in vars(torch).items() if isinstance(kind, torch.dtype)},
}


_STATEFUL = (_History, argparse.Namespace, np.ndarray, np.dtype, collections.OrderedDict)


class UntrustedFileError(ValueError):
    """A file holds more than tensors and plain data, so reading it could execute code."""


_InPython: Any = pickle._Unpickler


class _Unpickler(_InPython):
    """An unpickler that resolves only allowlisted names, for torch releases whose own list is fixed."""

    dispatch = dict(_InPython.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        module = {'__builtin__': 'builtins'}.get(module, module)
        found = {**_OF_TORCH, **_NAMES}.get(f'{module}.{name}')
        if found is None:
            raise pickle.UnpicklingError(f'it names {module}.{name}')
        return found

    def load_build(self) -> None:
        """Set the state of an object. Refuse to change a class or a function."""
        if not isinstance(self.stack[-2], _STATEFUL):
            raise pickle.UnpicklingError(f'it changes a {type(self.stack[-2]).__name__}')
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def _load_pickle(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


# Passed to torch.load as its pickle module.
_RESTRICTED = SimpleNamespace(__name__='pickle', Unpickler=_Unpickler, load=_load_pickle)


def _load_restricted(path: Path, map_location: Any) -> Any:
    """Like :func:`_load_weights`, for torch releases whose allowlist cannot be extended."""
    return torch.load(path, map_location=map_location, pickle_module=_RESTRICTED, weights_only=False)


def _load_weights(path: Path, map_location: Any) -> Any:
    names: list[Any] = [(value, name) for name, value in _NAMES.items()]
    with torch.serialization.safe_globals(names):
        return torch.load(path, map_location=map_location, weights_only=True)


_load_safely = _load_weights if digit_version(torch.__version__) >= digit_version('2.6') else _load_restricted


def read_checkpoint(
    path: str | os.PathLike, trust: bool = False, map_location: Any = 'cpu', advice: str = 'read it with `trust=True`'
) -> Any:
    """Read a checkpoint file of any program without executing anything in it.

    It reads tensors, plain data, NumPy arrays and numbers, and the logs in MMEngine's training checkpoints.
    ``.safetensors`` files are read completely.

    Args:
        path: The file.
        trust: Whether to unpickle a file that holds anything else. This can execute code. Defaults to False.
        map_location: Device for the tensors. Defaults to ``'cpu'``.
        advice: How the user can trust a file, for the error message.

    Returns:
        The content of the file.

    Raises:
        UntrustedFileError: The file holds anything else and is not trusted.
        DamagedFileError: It is not a valid checkpoint.
        FileNotFoundError: The file does not exist.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    if path.suffix == '.safetensors':
        return load_safetensors(str(path), map_location)
    try:
        if trust:
            return torch.load(path, map_location=map_location, weights_only=False)
        reason = _program(path)
        if reason is None:
            return _load_safely(path, map_location)
    except pickle.UnpicklingError as error:
        reason = _without_advice(str(error))
    except Exception as error:  # damaged bytes can raise any exception
        raise DamagedFileError(f'{path} is not a valid checkpoint: {shortened(repr(error))}') from error
    if not _is_pickled(path):
        raise DamagedFileError(f'{path} is not a valid checkpoint: {shortened(reason)}')
    raise UntrustedFileError(
        f'{path} holds more than tensors and plain data, and reading it could execute code. If you trust its origin, '
        f'{advice}. ({shortened(reason)})'
    )


def _without_advice(message: str) -> str:
    """Keep the cause in a message of torch and drop its advice."""
    lines = message.splitlines()
    lines = [line for line in lines if 'GLOBAL' in line] or message.rpartition('error:')[2].split('\n')
    return next((line.strip() for line in lines if line.strip()), message)


def _program(path: Path) -> str | None:
    """Say why a file is not a checkpoint but something that torch.load would run or unpack."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                return 'it is a TorchScript program'
    elif tarfile.is_tarfile(path):
        return 'it is a tar archive, as torch wrote before 2017'
    return None


def _is_pickled(path: Path) -> bool:
    """Whether a file starts like a pickle or an archive."""
    with open(path, 'rb') as file:
        start = file.read(2)
    return start == b'PK' or start[:1] == pickle.PROTO or tarfile.is_tarfile(path)


def state_dict_of(content: Any, path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint: its ``state_dict``, its ``model``, or the checkpoint itself.

    Args:
        content: The content of the file.
        path: The file's name, for error messages.

    Raises:
        DamagedFileError: The checkpoint has no state dict of tensors.
    """
    for key in ('state_dict', 'model'):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise DamagedFileError(f'{path} is not a checkpoint: it holds no `state_dict` of tensors')
    return dict(content)


def fetch_checkpoint(url: str) -> Path:
    """Download a checkpoint into torch's hub folder, unless it is there. Rank 0 does, and the others wait.

    Args:
        url: An ``http`` or ``https`` URL.

    Returns:
        The file.
    """
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    path = folder / Path(urlparse(url).path).name
    if is_main_process() and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))
    barrier()
    return path


def guard_loading(trust: bool = False, advice: str = 'read it with `trust=True`') -> None:
    """Make MMEngine read checkpoints with :func:`read_checkpoint` in this process, both local files and downloads.

    MMEngine's own reader unpickles whatever it does not know. The command-line tools call this function. A program that
    imports the package keeps MMEngine's behaviour until it calls this function itself.

    Args:
        trust: Whether to unpickle files that could execute code. Defaults to False.
        advice: How the user can trust a file, for the error message.
    """

    def load_from_local(filename: str, map_location: Any = None) -> Any:
        return read_checkpoint(filename, trust, map_location, advice)

    def load_from_http(filename: str, map_location: Any = None, **_: Any) -> Any:
        return read_checkpoint(fetch_checkpoint(filename), trust, map_location, advice)

    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), loader=load_from_http, force=True)
    loaders.load_from_http = load_from_http  # MMEngine uses it for torchvision:// and similar
