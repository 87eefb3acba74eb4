"""Samples and recorded tensors as bytes, without pickle.

A record is a header in JSON, which names types out of :data:`ELEMENTS` only, and the raw values of its arrays.
Reading one executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from iconformer_mm.checkpoint.safetensors_io import DamagedFileError
from iconformer_mm.tuning.families import class_path

_ALIGNMENT = 8
_LENGTH = 8  # bytes before the header that give its length
_SMALLER = (torch.uint8, torch.int8, torch.int16, torch.int32)

# What samples are made of, by import path. Values beside the fields are listed for those that have no fields.
_MMDET = 'mmdet.structures.'
ELEMENTS: dict[str, tuple[str, ...] | None] = {
    'mmengine.structures.instance_data.InstanceData': None,
    'mmengine.structures.label_data.LabelData': None,
    'mmengine.structures.pixel_data.PixelData': None,
    'mmpretrain.structures.data_sample.DataSample': None,
    'mmpretrain.structures.multi_task_data_sample.MultiTaskDataSample': None,
    'mmseg.structures.seg_data_sample.SegDataSample': None,
    _MMDET + 'det_data_sample.DetDataSample': None,
    _MMDET + 'bbox.horizontal_boxes.HorizontalBoxes': ('tensor',),
    _MMDET + 'mask.structures.BitmapMasks': ('masks', 'height', 'width'),
    _MMDET + 'mask.structures.PolygonMasks': ('masks', 'height', 'width'),
}


class UnstorableError(ValueError):
    """A sample holds what a record cannot."""


class _Writer:
    def __init__(self) -> None:
        self.blobs: list[bytes] = []
        self.size = 0

    def _blob(self, data: bytes) -> int:
        start = self.size
        padding = -len(data) % _ALIGNMENT
        self.blobs += [data, bytes(padding)]
        self.size += len(data) + padding
        return start

    def node(self, value: Any) -> Any:
        """The JSON of a value."""
        if isinstance(value, np.generic):
            return {'scalar': self._array(np.asarray(value))}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if type(value) is list:
            return [self.node(v) for v in value]
        if type(value) is tuple:
            return {'tuple': [self.node(v) for v in value]}
        if isinstance(value, Mapping):
            return {'dict': [[self.node(k), self.node(v)] for k, v in value.items()]}
        if isinstance(value, np.ndarray):
            return {'array': self._array(value)}
        if type(value) in (Tensor, torch.nn.Parameter):
            return {'tensor': self._tensor(value)}
        path = class_path(type(value))
        if path in ELEMENTS:
            names = ELEMENTS[path]
            if names is not None:
                return {'object': [path, [self.node(getattr(value, name)) for name in names]]}
            # MMEngine keeps the names in sets, whose order differs from process to process.
            both = sorted(value.metainfo_items()), sorted(value.items())
            fields = [[[k, self.node(v)] for k, v in items] for items in both]
            return {'element': [path, *fields]}
        raise UnstorableError(
            f'a sample of the data set holds a {path}, which the prefix cache cannot store. It stores numbers, texts, '
            f'arrays, tensors, lists, dicts, and {", ".join(p.rpartition(".")[2] for p in ELEMENTS)}'
        )

    def _array(self, value: np.ndarray) -> list:
        if value.dtype.hasobject:
            raise UnstorableError('a sample of the data set holds an array of objects, which no file can store')
        if value.dtype == np.uint8 and value.size >= 64 and value.max() <= 1:
            return ['bits', value.shape, self._blob(np.packbits(value).tobytes())]
        return [value.dtype.str, value.shape, self._blob(np.ascontiguousarray(value).tobytes())]

    def _tensor(self, value: Tensor) -> list:
        value = value.detach().cpu().contiguous()
        stored = value
        if value.dtype in (torch.int64, torch.int32) and value.numel() >= 64:
            # Maps of classes, which are int64, need a byte each.
            low, high = (int(v) for v in value.aminmax())
            small = [d for d in _SMALLER if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max]
            stored = value.to(small[0]) if small else value
        flat = torch.empty(stored.numel(), dtype=stored.dtype)
        flat.copy_(stored.reshape(-1))  # of stride 1, which a single element need not have
        data = flat.view(torch.uint8).numpy().tobytes()
        return [_name(value.dtype), _name(stored.dtype), list(value.shape), self._blob(data)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')


def encode(value: Any) -> bytes:
    """Make bytes of a sample.

    Args:
        value: Numbers, texts, arrays, tensors, lists, tuples and dicts of them, and the classes in :data:`ELEMENTS`.

    Raises:
        UnstorableError: It holds something else.
    """
    writer = _Writer()
    header = json.dumps(writer.node(value), separators=(',', ':')).encode()
    header += b' ' * (-(len(header) + _LENGTH) % _ALIGNMENT)
    return b''.join([len(header).to_bytes(_LENGTH, 'little'), header, *writer.blobs])


class _Reader:
    def __init__(self, data: bytearray, start: int) -> None:
        self.data = data
        self.start = start

    def value(self, node: Any) -> Any:
        """The value of a JSON node."""
        if isinstance(node, list):
            return [self.value(n) for n in node]
        if not isinstance(node, dict):
            return node
        ((kind, content),) = node.items()
        if kind == 'tuple':
            return tuple(self.value(n) for n in content)
        if kind == 'dict':
            return {self.value(k): self.value(v) for k, v in content}
        if kind == 'array':
            return self._array(*content)
        if kind == 'scalar':
            return self._array(*content)[()]
        if kind == 'tensor':
            return self._tensor(*content)
        path, *rest = content
        names = ELEMENTS[path]
        module, _, name = path.rpartition('.')
        cls = getattr(import_module(module), name)
        if kind == 'object' and names is not None:
            return cls(*(self.value(n) for n in rest[0]))
        if kind != 'element' or names is not None:
            raise ValueError(f'a value of the unknown kind {kind!r}')
        element: BaseDataElement = cls()
        for fields, field_type in zip(rest, ('metainfo', 'data')):
            for key, field in fields:
                element.set_field(self.value(field), key, field_type=field_type)
        return element

    def _array(self, dtype: str, shape: list[int], start: int) -> np.ndarray:
        size = int(np.prod(shape, dtype=np.int64))
        if dtype == 'bits':
            packed = np.frombuffer(self.data, np.uint8, -(-size // 8), self.start + start)
            return np.unpackbits(packed, count=size).reshape(shape)
        if np.dtype(dtype).hasobject:
            raise ValueError('an array of objects')
        return np.frombuffer(self.data, np.dtype(dtype), size, self.start + start).reshape(shape)

    def _tensor(self, dtype: str, stored: str, shape: list[int], start: int) -> Tensor:
        size = int(np.prod(shape, dtype=np.int64))
        if not size:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        found = torch.frombuffer(self.data, dtype=getattr(torch, stored), count=size, offset=self.start + start)
        return found.reshape(shape).to(getattr(torch, dtype))


def decode(data: bytearray) -> Any:
    """Make a sample of the bytes that :func:`encode` gave. Its arrays share their memory.

    Args:
        data: The bytes.

    Raises:
        DamagedFileError: They are no such bytes.
    """
    try:
        length = int.from_bytes(data[:_LENGTH], 'little')
        return _Reader(data, _LENGTH + length).value(json.loads(data[_LENGTH : _LENGTH + length]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, RuntimeError) as error:
        raise DamagedFileError(f'a record of the prefix cache is damaged: {type(error).__name__}: {error}') from error
