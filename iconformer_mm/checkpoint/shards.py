"""Large bases: modules without values, and weights read tensor by tensor to their place."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from iconformer_mm.files import expanded
from iconformer_mm.tuning.accounting import WeightsError, is_derived, output_norms, some
from iconformer_mm.tuning.backbones import is_below, join
from iconformer_mm.tuning.fingerprint import FingerprintStream
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.frozen_precision import FrozenPrecision
from iconformer_mm.tuning.injection import backbones_of, get_injection, outside_of

from .safetensors_io import DamagedFileError, parse_json, shortened

INDEX = '.safetensors.index.json'
_DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
    'F8_E4M3': torch.float8_e4m3fn,
    'F8_E5M2': torch.float8_e5m2,
}


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Build modules whose parameters have shapes, but no values: they are on torch's meta device.

    Only parameters are empty. Buffers are computed as always, those that no file holds included. A layer's own
    allocation is dropped before it is initialised, so building takes neither memory nor time. Fill the parameters with
    :func:`load_shards`. The context changes ``nn.Module`` for all threads.

    Example:
        >>> with empty_parameters():
        ...     model = timm.create_model('vit_giant_patch14_dinov2', num_classes=0)
        >>> inject(model, 'icon', frozen_dtype='int8')
        >>> load_shards(model, 'weights/model.safetensors.index.json')
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(module, name, param)
        if param is not None and not param.is_meta and not isinstance(param, UninitializedParameter):
            module._parameters[name] = nn.Parameter(param.data.to('meta'), requires_grad=param.requires_grad)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file.

    Attributes:
        path: The file.
        dtype: Its dtype there.
        shape: Its shape.
        start: Its first byte in the file.
    """

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    start: int

    def read(self, file: IO[bytes]) -> Tensor:
        """Read the tensor. Nothing but its own memory is taken.

        Raises:
            DamagedFileError: The file has become shorter.
        """
        value = torch.empty(self.shape, dtype=self.dtype)
        memory = value.reshape(-1).view(torch.uint8).numpy()
        file.seek(self.start)
        if file.readinto(memory) != memory.nbytes:  # type: ignore[attr-defined]
            raise DamagedFileError(f'{self.path} is truncated: it ends within a tensor. Copy or download it again')
        return value


def find_stored(path: str | os.PathLike) -> dict[str, Stored]:
    """List the tensors of a safetensors file, or of the shards that an index names. No tensor is read.

    Args:
        path: A ``.safetensors`` file, or an index (``model.safetensors.index.json``). Shards lie in the folder of the
            index. Names with a folder are refused.

    Raises:
        DamagedFileError: A file is truncated or altered, or the index is wrong.
        FileNotFoundError: A file does not exist.
    """
    path = expanded(path)
    if not path.name.endswith('.json'):
        return _tensors_of(path)
    by_shard = _read_index(path)
    found: dict[str, Stored] = {}
    for shard, names in sorted(by_shard.items()):
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(
                f'{path} names the shard {shortened(shard)}, which is not in {path.parent}. Copy or download it, too'
            )
        held = _tensors_of(path.parent / shard)
        absent = sorted(names - held.keys())
        if absent:
            raise DamagedFileError(
                f'{path} does not belong to its shards: {shortened(absent[0])} is not in {shortened(shard)}. Copy or '
                'download index and shards again'
            )
        found.update({name: held[name] for name in names})
    return found


def _read_index(path: Path) -> dict[str, set[str]]:
    """Return the names of the tensors of each shard."""
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist')
    try:
        placed = parse_json(path.read_text(encoding='utf-8'))['weight_map']
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(
            f'{path} is not an index of shards: it has no `weight_map` ({type(error).__name__}: '
            f'{shortened(str(error))})'
        ) from error
    if not isinstance(placed, dict) or not placed or not all(isinstance(shard, str) for shard in placed.values()):
        raise DamagedFileError(f'{path} is not an index of shards: its `weight_map` maps no names to files')
    by_shard: dict[str, set[str]] = {}
    for name, shard in placed.items():
        if shard in ('', '.', '..') or any(c in shard for c in '/\\:\0') or not shard.endswith('.safetensors'):
            raise DamagedFileError(
                f'{path} names the file {shortened(shard)!r}. Shards must be .safetensors files in the folder of the '
                'index, by plain names'
            )
        by_shard.setdefault(shard, set()).add(name)
    return by_shard


def _tensors_of(path: Path) -> dict[str, Stored]:
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist')
    try:
        with safetensors.safe_open(path, framework='pt') as file:  # checks header and length
            names = set(file.keys())
        with open(path, 'rb') as raw:
            length = int.from_bytes(raw.read(8), 'little')
            header = json.loads(raw.read(length))
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise DamagedFileError(
            f'{path} is not a valid safetensors file: {shortened(str(error))}. It may be truncated: copy or download '
            'it again'
        ) from error
    found = {}
    for name in names:
        entry: dict[str, Any] = header[name]
        if entry['dtype'] not in _DTYPES:
            raise DamagedFileError(f'{path}: {shortened(name)} has the dtype {shortened(entry["dtype"])}')
        start = 8 + length + entry['data_offsets'][0]
        found[name] = Stored(path, _DTYPES[entry['dtype']], torch.Size(entry['shape']), start)
    return found


def load_shards(model: nn.Module, path: str | os.PathLike, prefix: str = '', device: Any = None) -> list[str]:
    """Load weights tensor by tensor, each straight to its place, in the dtype that is there.

    At any time, memory holds what is loaded so far and one tensor. Parameters may be empty (:func:`empty_parameters`)
    or have values. In a model with a ``frozen_dtype``, each weight is rounded or packed as it arrives. The fingerprint
    of the base is computed on the way.

    Every tensor of the model is loaded, or it is new and trained, or it is an error, as for other loads of an adapted
    model. This is checked before the first tensor is read. Hooks that hosts run on a state dict, such as those that
    resize position embeddings, do not run: a tensor of another shape is an error.

    Args:
        model: The model, or the backbone that the file is of.
        path: A ``.safetensors`` file, or an index of shards (``model.safetensors.index.json``).
        prefix: Only names in the file that start with it are loaded, without it, as in MMEngine's
            ``init_cfg=dict(type='Pretrained', prefix=...)``. ``module.`` is dropped, too. Defaults to none.
        device: Where to put the tensors, and all else of the model. Defaults to None: the CPU.

    Returns:
        Names in the file that the model does not have, sorted.

    Raises:
        DamagedFileError: A file is truncated or altered, or an index is wrong.
        FileNotFoundError: A file does not exist.
        WeightsError: A tensor is missing, has another shape, or cannot be held in the model's precision.
    """
    stored = _select(find_stored(path), prefix, path)
    slots = _slots_of(model)
    held = _held_weights(model)
    _check_fit(model, stored, slots, held, path)
    streams = {id(precision): FingerprintStream(precision.sets) for precision, _ in held.values()}
    placing = _Placing(model, slots, torch.device(device or 'cpu'))
    owners = _precisions_by_name(model)
    with ExitStack() as files:
        opened = {p: files.enter_context(open(p, 'rb')) for p in {s.path for s in stored.values()}}
        for name in sorted(stored.keys() & (slots.keys() | held.keys())):
            value = stored[name].read(opened[stored[name].path])
            precision, local = owners.get(name, (None, name))
            if precision is not None and id(precision) in streams:
                streams[id(precision)].update(local, value)
            if name in held:
                precision, local = held[name]
                precision.take(local, value.to(placing.device))
                del value
                return_freed_memory()
            else:
                placing.put(name, value)
    for precision, _ in held.values():
        if id(precision) in streams:
            precision.record(streams.pop(id(precision)).complete())
    _reset_norms(model, placing.device)
    if device is not None:
        model.to(device)
    _settle(model, stored.keys())
    unused = sorted(stored.keys() - slots.keys() - held.keys())
    if unused:
        print_log(f'{path}: {len(unused)} tensors are not of the model, such as {some(unused)}', logger='current')
    return unused


def return_freed_memory() -> None:
    """Give memory that was freed back to the system. glibc keeps it, and packing a weight takes much of it."""
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None
    if trim is not None:
        trim(0)


def _select(stored: dict[str, Stored], prefix: str, path: Any) -> dict[str, Stored]:
    """Return the tensors below a prefix, by their names without it."""
    stored = {name.removeprefix('module.'): place for name, place in stored.items()}
    if not prefix:
        return stored
    prefix = prefix if prefix.endswith('.') else f'{prefix}.'
    chosen = {name[len(prefix) :]: place for name, place in stored.items() if name.startswith(prefix)}
    if not chosen:
        raise WeightsError(f"{path} has no names with the prefix '{prefix}'; it has {some(sorted(stored))}")
    return chosen


def _slots_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, under all of their names."""
    return model.state_dict(keep_vars=True)


def _precisions_by_name(model: nn.Module) -> dict[str, tuple[FrozenPrecision, str]]:
    """Return the precision that holds each parameter of an adapted backbone, with its name there."""
    injection = get_injection(model)
    if injection is None:
        return {}
    paths = {id(module): path for path, module in model.named_modules()}
    return {
        join(paths[id(precision.module)], name): (precision, name)
        for precision in injection.precisions
        for name in precision.sets[0]
    }


def _held_weights(model: nn.Module) -> dict[str, tuple[FrozenPrecision, str]]:
    """Return those of them that are packed."""
    return {n: (p, local) for n, (p, local) in _precisions_by_name(model).items() if local in p.weights}


def _check_fit(
    model: nn.Module,
    stored: dict[str, Stored],
    slots: dict[str, Tensor],
    held: dict[str, tuple[FrozenPrecision, str]],
    path: Any,
) -> None:
    """Refuse a file that does not fill a model."""
    shapes = {name: p.weights[local].shape for name, (p, local) in held.items()}
    for name, own in slots.items():
        there, here = stored.get(name), shapes.get(name, own.shape)
        if there is not None and there.shape != here:
            packed = there.dtype == torch.uint8 and name in held
            raise WeightsError(
                f'{path}: {name} has shape {tuple(there.shape)}, the model {tuple(here)}'
                + ('. Packed weights cannot be loaded by shards: give those in floating point' if packed else '')
            )
    injection = get_injection(model)
    backbones = backbones_of(model)
    may_lack: set[str] = set()
    heads: list[str] = []
    for base_path, backbone in backbones.items():
        if injection is not None:
            may_lack |= {join(base_path, name) for name in output_norms(backbone)}
            heads += [join(base_path, name) for name in outside_of(injection, backbone)]
    known = {id(slots[name]) for name in stored.keys() & slots.keys()}  # tied parameters have several names
    missing = [
        name
        for name, own in slots.items()
        if name not in stored and id(own) not in known and not is_derived(name) and name not in may_lack
    ]
    new = [name for name in missing if is_adapter(name) or _is_new(name, slots[name], backbones, heads)]
    absent = sorted(set(missing) - set(new))
    if absent:
        raise WeightsError(
            f'{path} lacks {len(absent)} tensors of {type(model).__name__}, such as {some(absent)}; it has '
            f'{some(sorted(stored))}. Name the right `prefix`, or build the model without these parts'
        )
    empty = [name for name in new if slots[name].is_meta]
    if empty:
        raise WeightsError(
            f'{empty[0]} has no values, and {path} does not hold it. Build the base in empty_parameters(), and inject '
            "outside of torch.device('meta')"
        )


def _is_new(name: str, own: Tensor, backbones: Iterable[str], heads: Iterable[str]) -> bool:
    """Whether a tensor outside of the backbones has values and is trained. Its BatchNorm statistics count, too."""
    inside = any(not path or is_below(name, [path]) for path in backbones) and not is_below(name, heads)
    return not inside and not own.is_meta and (own.requires_grad or not isinstance(own, nn.Parameter))


class _Placing:
    """Puts values where a model has its parameters and buffers.

    Args:
        model: The model.
        slots: Its parameters and buffers by name.
        device: Where values go.
    """

    def __init__(self, model: nn.Module, slots: dict[str, Tensor], device: torch.device) -> None:
        self.slots = slots
        self.device = device
        # Shared parameters lie in several places.
        self._places: dict[int, list[tuple[dict, str]]] = {}
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for local, tensor in own.items():
                    if tensor is not None:
                        self._places.setdefault(id(tensor), []).append((own, local))

    @torch.no_grad()
    def put(self, name: str, value: Tensor) -> None:
        """Put a value in place: into the memory that is there, or in place of an empty parameter."""
        own = self.slots[name]
        if not own.is_meta:
            own.copy_(value)
            return
        made: Tensor = value.to(device=self.device, dtype=own.dtype)
        if isinstance(own, nn.Parameter):
            made = nn.Parameter(made, requires_grad=own.requires_grad)
        for places, local in self._places[id(own)]:
            places[local] = made


def _reset_norms(model: nn.Module, device: torch.device) -> None:
    """Initialise empty output norms, which weights may lack, and refuse whatever else is left without values."""
    for backbone in backbones_of(model).values():
        for name in {n.rpartition('.')[0] for n in output_norms(backbone)}:
            norm: Any = backbone.get_submodule(name)
            if any(p.is_meta for p in norm.parameters(recurse=False)) and hasattr(norm, 'reset_parameters'):
                trained = {n: p.requires_grad for n, p in norm.named_parameters(recurse=False)}
                norm.to_empty(device=device, recurse=False)
                norm.reset_parameters()
                for local, parameter in norm.named_parameters(recurse=False):
                    parameter.requires_grad_(trained[local])
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise WeightsError(
            f'{len(left)} tensors have no values, such as {some(left)}: no file holds them, and they were computed '
            'from parameters. Build the model with its values (without empty_parameters)'
        )


def _settle(model: nn.Module, arrived: Iterable[str]) -> None:
    """Tell the accounts of an adapted model what was loaded."""
    injection = get_injection(model)
    if injection is None:
        return
    names = set(arrived)
    paths = {id(module): path for path, module in model.named_modules()}
    for own_path, backbone in injection.backbones.items():
        start = len(join(paths[id(backbone)], 'x')) - 1
        inside = {n[start:] for n in names if not paths[id(backbone)] or is_below(n, [paths[id(backbone)]])}
        if own_path in injection.accounts:
            injection.accounts[own_path].note(inside)
        if own_path in injection.trained:
            injection.trained[own_path].renew()
