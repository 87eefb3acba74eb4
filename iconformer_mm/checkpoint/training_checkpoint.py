"""Training checkpoints of the trained part of a model, as safetensors: nothing is unpickled.

MMEngine's Runner produces a checkpoint of nested dictionaries. Its tensors
become the file's tensors, named by their path (``state_dict/head.fc.weight``,
``optimizer/state/0/exp_avg``). The nesting itself becomes JSON in the metadata.
If two tensors have the same path, a number is appended to the second name.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor

from iconformer_mm.version import __version__

from .safetensors_io import DamagedFileError, parse_json, save_safetensors, shortened

CHECKPOINT_VERSION = 1
_KEY = 'iconformer_mm.checkpoint'
_TAG = '$'
# Dtypes that NumPy, safetensors and every supported version of torch have in common.
_ARRAY_TYPES = ('float64', 'float32', 'float16', 'int64', 'int32', 'int16', 'int8', 'uint8', 'bool')
_LIST_ARRAY_BYTES = 2**26  # memory limit for arrays of other dtypes
_SEQUENCES = {'tuple': tuple, 'set': set, 'frozenset': frozenset}
# Exceptions that decoding malformed content may raise.
_MALFORMED = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    RecursionError,
    AssertionError,
    OverflowError,
    MemoryError,
)


class _Encoder:
    """Converts nested data to JSON values and collects the tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def _keep(self, tensor: Tensor, place: str) -> str:
        """Store a tensor under a unique name: in {'a/b': x, 'a': {'b': y}} two tensors have the same path."""
        name, number = place, 1
        while name in self.tensors or name in ('', '__metadata__'):
            number += 1
            name = f'{place}#{number}'
        self.tensors[name] = tensor
        return name

    def encode(self, value: Any, place: str) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if np.isfinite(value) else self._tagged('float', value=str(value))
        if isinstance(value, Tensor):
            return self._tagged('tensor', place=self._keep(value, place))
        if isinstance(value, np.ndarray):
            if value.dtype.name in _ARRAY_TYPES:
                native = value.astype(value.dtype.newbyteorder('='))
                tensor = torch.from_numpy(np.ascontiguousarray(native).reshape(value.shape).copy())
                return self._tagged('array', place=self._keep(tensor, place))
            return self._tagged('list_array', dtype=value.dtype.str, items=self.encode(value.tolist(), place))
        if isinstance(value, HistoryBuffer):
            values, counts = value.data
            return self._tagged(
                'history',
                values=self.encode(np.asarray(values), f'{place}/values'),
                counts=self.encode(np.asarray(counts), f'{place}/counts'),
                max_length=value.max_length,
            )
        if isinstance(value, Mapping):
            if all(isinstance(key, str) for key in value) and _TAG not in value:
                return {key: self.encode(item, f'{place}/{key}' if place else key) for key, item in value.items()}
            items = [[self.encode(key, place), self.encode(item, f'{place}/{key}')] for key, item in value.items()]
            return self._tagged('dict', items=items)
        for kind in (list, tuple, set, frozenset):
            # Named tuples are excluded: they would be restored as another type.
            if isinstance(value, kind) and not hasattr(value, '_fields'):
                items = [self.encode(item, f'{place}/{index}') for index, item in enumerate(value)]
                return items if kind is list else self._tagged(kind.__name__, items=items)
        raise TypeError(f'{place}: a {type(value).__name__} cannot be stored')

    @staticmethod
    def _tagged(kind: str, **content: Any) -> dict[str, Any]:
        return {_TAG: kind, **content}


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: _decode(item, tensors) for key, item in value.items()}
    if kind == 'float':
        return float(value['value'])
    if kind == 'tensor':
        return tensors[value['place']]
    if kind == 'array':
        return tensors[value['place']].cpu().numpy()
    if kind == 'history':
        return HistoryBuffer(
            _decode(value['values'], tensors), _decode(value['counts'], tensors), int(value['max_length'])
        )
    items = _decode(value['items'], tensors)
    if kind == 'list_array':
        dtype = np.dtype(value['dtype'])
        if dtype.itemsize * np.array(items, dtype=object).size > _LIST_ARRAY_BYTES:
            raise ValueError(f'an array of dtype {dtype.str} would take more than {_LIST_ARRAY_BYTES} bytes')
        return np.array(items, dtype=dtype)
    if kind == 'dict':
        content = dict(items)
        if len(content) < len(items):
            raise ValueError('a dictionary has a duplicate key')
        return content
    return _SEQUENCES[kind](items)


def _keepable(mapping: Mapping, place: str) -> dict:
    """Return the items that can be stored. The others are listed in the log."""
    kept = {}
    for key, value in mapping.items():
        try:
            _Encoder().encode(value, f'{place}/{key}')
        except TypeError as error:
            print_log(f'left out of the checkpoint: {error}', logger='current', level=logging.WARNING)
        else:
            kept[key] = value
    return kept


def save_checkpoint(checkpoint: dict[str, Any], path: str | os.PathLike) -> None:
    """Write a checkpoint of MMEngine's Runner as safetensors, atomically.

    Values in ``meta`` and in the message hub that are not plain data are left
    out. The log lists them.

    Args:
        checkpoint: Nested dictionaries, lists, tensors, arrays, numbers,
            strings and history buffers.
        path: Where to write.

    Raises:
        TypeError: Another part of the checkpoint holds a type that cannot be
            stored.
        OSError: The file cannot be written.
    """
    checkpoint = dict(checkpoint, meta=_keepable(checkpoint['meta'], 'meta'))
    hub = checkpoint['message_hub']
    checkpoint['message_hub'] = {**hub, 'runtime_info': _keepable(hub['runtime_info'], 'message_hub/runtime_info')}
    encoder = _Encoder()
    tree = encoder.encode(checkpoint, '')
    content = dict(version=CHECKPOINT_VERSION, package_version=__version__, tree=tree)
    save_safetensors(encoder.tensors, path, metadata={_KEY: json.dumps(content, allow_nan=False)})


def is_checkpoint(metadata: dict[str, str]) -> bool:
    """Whether the metadata of a safetensors file belongs to a training checkpoint."""
    return _KEY in metadata


def decode_checkpoint(metadata: dict[str, str], tensors: dict[str, Tensor], path: str = 'the file') -> dict[str, Any]:
    """Rebuild a checkpoint from the content of a safetensors file.

    Args:
        metadata: The file's metadata.
        tensors: The file's tensors.
        path: The file's name, for error messages.

    Raises:
        DamagedFileError: The content is not a valid checkpoint.
    """
    try:
        content = parse_json(metadata[_KEY])
        version = content['version']
        if type(version) is int and version == CHECKPOINT_VERSION:
            checkpoint = _decode(content['tree'], tensors)
            if isinstance(checkpoint['meta'], dict) and _is_state_dict(checkpoint['state_dict']):
                # On resuming, MMEngine would run it as Python code. Current releases no longer write it.
                checkpoint['meta'].pop('config', None)
                if not _describes_data(checkpoint['meta'].get('dataset_meta')):
                    raise ValueError('its `dataset_meta` has no valid `classes`')
                return checkpoint
    except _MALFORMED as error:
        raise DamagedFileError(
            f'{path} is not a valid training checkpoint: {type(error).__name__}: {shortened(str(error))}'
        ) from error
    if type(version) is not int or version != CHECKPOINT_VERSION:
        raise DamagedFileError(
            f'{path} has checkpoint version {shortened(version, 20)}, this iconformer_mm {__version__} reads version '
            f'{CHECKPOINT_VERSION}. Install the release that wrote the file, or a newer one'
        )
    raise DamagedFileError(f'{path} is not a valid training checkpoint: it lacks `meta` or `state_dict`')


def raw_state(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the raw trained weights of a checkpoint whose ``state_dict`` holds averaged weights.

    MMEngine stores the raw weights in ``ema_state_dict``, with names that start with ``module.``.
    """
    slots = checkpoint['ema_state_dict']
    return {name: slots.get(f'module.{name}', value) for name, value in checkpoint['state_dict'].items()}


def check_note(note: Any, path: Any) -> None:
    """Check the note that AdapterCheckpointHook adds to MMEngine's checkpoint.

    Args:
        note: The note, as read.
        path: The file's name, for error messages.

    Raises:
        DamagedFileError: The note is not in the format that the hook writes.
    """
    if not isinstance(note, dict):
        raise DamagedFileError(f'{path} is not a valid training checkpoint: its note is a {type(note).__name__}')
    for key, is_proper in _NOTE.items():
        if key not in note or not is_proper(note[key]):
            raise DamagedFileError(f'{path} is not a valid training checkpoint: its note has no valid `{key}`')
    for key, is_proper in _LATER_NOTE.items():
        if note.get(key) is not None and not is_proper(note[key]):
            raise DamagedFileError(f'{path} is not a valid training checkpoint: its note has no valid `{key}`')


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _describes_data(value: Any) -> bool:
    """Whether a value is data set metadata. Only the part that is used here is checked."""
    if value is None:
        return True
    classes = value.get('classes') if isinstance(value, dict) else 0
    return classes is None or (
        isinstance(classes, (list, tuple)) and all(isinstance(name, (str, int)) for name in classes)
    )


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(n, str) and (isinstance(v, Tensor) or n.endswith('_extra_state')) for n, v in value.items()
    )


def _is_rank_state(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_state_dict(value.get('gradients')):
        return False
    state = value.get('random')
    return isinstance(state, dict) and _restores(state)


def _restores(state: dict[str, Any]) -> bool:
    """Whether a random state is valid. It is tried on temporary generators."""
    try:
        random.Random().setstate(state['python'])
        np.random.RandomState().set_state(state['numpy'])
        torch.Generator().set_state(state['torch'].cpu())
        return state.get('cuda') is None or isinstance(state['cuda'], Tensor)
    except (*_MALFORMED, RuntimeError):
        return False


# Keys that checkpoints of earlier releases lack.
_LATER_NOTE: dict[str, Callable[[Any], bool]] = {
    'trained': _are_texts,
    'heads': _are_texts,
    'backbones': lambda value: _are_texts(value) and bool(value),
    'selection': lambda value: isinstance(value, dict),
    'base_buffers': _are_texts,
    'base_dtype': lambda value: isinstance(value, str),
    'base_buffers_fingerprint': lambda value: isinstance(value, str),
    'scores': lambda value: isinstance(value, dict),
}
_NOTE: dict[str, Callable[[Any], bool]] = {
    'method': lambda value: isinstance(value, dict) and isinstance(value.get('type'), str),
    'task': lambda value: isinstance(value, str),
    'sites': _are_texts,
    'base_fingerprint': lambda value: isinstance(value, str),
    'base_parameters': _are_texts,
    'load_from': lambda value: value is None or isinstance(value, str),
    'rank_states': lambda value: isinstance(value, list) and all(map(_is_rank_state, value)),
}


def check_resumable(checkpoint: dict[str, Any], runner: Runner) -> None:
    """Check that a run can resume from a checkpoint, before anything is loaded from it.

    Args:
        checkpoint: The checkpoint.
        runner: The runner, with its optimizer built.

    Raises:
        DamagedFileError: The run cannot resume from the checkpoint.
    """
    meta, hub = checkpoint['meta'], checkpoint.get('message_hub')
    fault = None
    if any(type(meta.get(key)) is not int or meta[key] < 0 for key in ('epoch', 'iter')):
        fault = 'it has no valid `epoch` and `iter`'
    elif meta.get('seed') is not None and not is_seed(meta['seed']):
        fault = 'its `seed` is not an integer from 0 to 2**32 - 1'
    elif (
        not isinstance(hub, dict)
        or any(
            not isinstance(hub.get(part), dict) or not all(isinstance(key, str) for key in hub[part])
            for part in ('log_scalars', 'runtime_info', 'resumed_keys')
        )
        or not all(value is True for value in hub['resumed_keys'].values())
    ):
        fault = 'it has no valid `message_hub`'
    elif 'ema_state_dict' in checkpoint and not _is_state_dict(checkpoint['ema_state_dict']):
        fault = 'it has no valid `ema_state_dict`'
    elif 'optimizer' not in checkpoint:
        fault = (
            'it holds no optimizer, like those that scored best (best_*). Resume from a checkpoint of an epoch or '
            'iteration'
        )
    else:
        fault = _optimizer_fault(checkpoint['optimizer'], runner.optim_wrapper)
        schedulers, own = checkpoint.get('param_schedulers', []), runner.param_schedulers
        built = isinstance(own, list) and all(hasattr(scheduler, 'state_dict') for scheduler in own)
        if fault is None and built and not _alike(schedulers, [scheduler.state_dict() for scheduler in own]):
            fault = 'its `param_schedulers` do not match those of this run'
    if fault is not None:
        raise DamagedFileError(f'{runner._load_from} cannot be resumed from: {fault}')


def is_seed(value: Any) -> bool:
    """Whether a value from a file can seed all random generators."""
    return type(value) is int and 0 <= value < 2**32


def _optimizer_fault(state: Any, optim_wrapper: Any) -> str | None:
    """Describe why an optimizer state does not fit the optimizer of a run; None if it fits."""
    if not isinstance(optim_wrapper, OptimWrapper):
        return None  # several optimizers; MMEngine matches them by name
    own = optim_wrapper.state_dict()
    if not isinstance(state, dict) or not _alike(state.get('param_groups'), own['param_groups']):
        return (
            'its optimizer has other parameter groups than the optimizer of this run. Resume with the method and the '
            '`optim_wrapper` that it was trained with'
        )
    parameters = [p for group in optim_wrapper.param_groups for p in group['params']]
    slots = state.get('state')
    if not isinstance(slots, dict) or not all(
        type(index) is int and 0 <= index < len(parameters) and isinstance(slot, dict) for index, slot in slots.items()
    ):
        return 'the state of its optimizer does not match its parameters'
    for index, slot in slots.items():
        for name, value in slot.items():
            if isinstance(value, (dict, str)):
                return f'{shortened(name, 50)} of its optimizer is a {type(value).__name__}'
            # A factored state has fewer values than its parameter. No state has the same number in another shape.
            if isinstance(value, Tensor) and value.dim() > 0 and value.numel() > parameters[index].numel():
                return f'{shortened(name, 50)} of its optimizer has shape {tuple(value.shape)} for a parameter of '
                f'{tuple(parameters[index].shape)}'
    return None


def _alike(loaded: Any, own: Any) -> bool:
    """Whether data from a file has the structure of the run's: numbers for numbers, lists of equal length."""
    if isinstance(own, dict):
        return isinstance(loaded, dict) and all(
            _alike(loaded[key], value) for key, value in own.items() if key in loaded
        )
    if isinstance(own, (list, tuple)):
        return isinstance(loaded, (list, tuple)) and len(loaded) == len(own) and all(map(_alike, loaded, own))
    if isinstance(own, (int, float)):
        return isinstance(loaded, (int, float, Tensor))
    return not isinstance(own, str) or isinstance(loaded, str)
