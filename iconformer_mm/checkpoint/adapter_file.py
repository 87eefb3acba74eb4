"""Adapter files: what was trained, how it fits in, and on which base.

An adapter file is a safetensors file. Its tensors are the adapters, as
``backbone.<name in the backbone>``, and what stands beside the backbone (neck
and head) under its own names. Its metadata has one key, ``iconformer_mm``,
whose value is JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from iconformer_mm.tuning.accounting import (
    WeightsError,
    adopt_output_norms,
    base_buffers,
    complete_method,
    method_difference,
    trained_in_place,
)
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import adapter_shapes, find_backbone, get_injection, inject, remove, unwrap
from iconformer_mm.tuning.switching import active_adapter, add_adapter, delete_adapter, set_adapter
from iconformer_mm.version import __version__

from .safetensors_io import DamagedFileError, read_safetensors, save_safetensors
from .training_checkpoint import is_checkpoint

FORMAT_VERSION = 1
_KEY = 'iconformer_mm'
_BACKBONE = 'backbone.'


class AdapterFileError(ValueError):
    """An adapter file cannot be read, or does not fit the model."""


def fingerprint(model: nn.Module) -> str:
    """Identify the base weights: the backbone's own parameters, without adapters.

    Names and values are hashed, the values once rounded to bfloat16 and once
    to float16, so that a copy in half precision can be told, too. Any device
    and any order of parameters give the same.

    Args:
        model: A model, or a backbone alone.

    Returns:
        Two halves of 32 hexadecimal digits: start of the SHA-256 with
        bfloat16, and with float16. :func:`same_base` compares.
    """
    return hash_parameters(base_parameters(model))


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The backbone's own parameters, without adapters and what is trained in place, by their names in it."""
    trained = _trained(model)
    named = find_backbone(model).named_parameters()
    return {n: p.detach() for n, p in named if not is_adapter(n) and n not in trained}


def _trained(model: nn.Module) -> set[str]:
    injection = get_injection(model)
    return set() if injection is None else trained_in_place(injection)


def describe_base(model: nn.Module) -> dict[str, Any]:
    """How a file tells the base that its adapter belongs to.

    Args:
        model: A model, or a backbone alone.

    Returns:
        ``base_fingerprint`` and ``base_parameters``, the fingerprint and the names of its parameters. Where the
        base has buffers that are learnt (running statistics), also ``base_buffers_fingerprint`` and
        ``base_buffers``. Counters and indices are left out: no evaluation reads the first, and the others
        follow from the architecture.
    """
    parameters, buffers = base_parameters(model), base_buffers(find_backbone(model))
    base: dict[str, Any] = dict(base_fingerprint=hash_parameters(parameters), base_parameters=sorted(parameters))
    if buffers:
        base.update(base_buffers_fingerprint=hash_parameters(buffers), base_buffers=sorted(buffers))
    return base


def base_difference(content: dict[str, Any], tensors: dict[str, Tensor]) -> str | None:
    """How a base differs from the one that a file belongs to.

    Args:
        content: What :func:`describe_base` gave, or metadata with it. Without the keys of buffers, as older
            files have it, parameters alone are compared.
        tensors: Parameters and buffers of the base, by their names in the backbone.

    Returns:
        The difference in words, None for the same base.
    """
    for what, prints, names in (
        ('weights have', 'base_fingerprint', 'base_parameters'),
        ('buffers (running statistics) have', 'base_buffers_fingerprint', 'base_buffers'),
    ):
        if prints not in content:
            continue
        missing = [name for name in content[names] if name not in tensors]
        if missing:
            return f'the base has no {missing[0]} ({len(missing)} of {len(content[names])} tensors are missing)'
        actual = hash_parameters({name: tensors[name] for name in content[names]})
        if not same_base(content[prints], actual):
            return f'the base {what} fingerprint {actual[:12]}, the adapter needs {content[prints][:12]}'
    return None


def base_of(model: nn.Module) -> dict[str, Tensor]:
    """What :func:`base_difference` compares: the own tensors of a model's backbone.

    Args:
        model: A model, or a backbone alone.
    """
    return {n: v for n, v in find_backbone(model).state_dict().items() if not is_adapter(n)}


def hash_parameters(parameters: dict[str, Tensor]) -> str:
    """The fingerprint of parameters by name; see :func:`fingerprint`."""
    halves = []
    for dtype in (torch.bfloat16, torch.float16):
        digest = hashlib.sha256()
        for name, value in sorted(parameters.items()):
            digest.update(f'{name} {tuple(value.shape)}\n'.encode())
            value = value.to(device='cpu', dtype=dtype).contiguous()
            digest.update(value.view(torch.int16).numpy().data)
        halves.append(digest.hexdigest()[:32])
    return ''.join(halves)


def same_base(first: str, second: str) -> bool:
    """Whether two fingerprints are of the same weights, be it that one copy is in half precision."""
    return len(first) == len(second) == 64 and (first[:32] == second[:32] or first[32:] == second[32:])


def _tuned_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors an adapter file holds, by the names they have there."""
    model = unwrap(model)
    backbone = find_backbone(model)
    trained = _trained(model)
    state = {_BACKBONE + n: v for n, v in backbone.state_dict().items() if is_adapter(n) or n in trained}
    if backbone is not model:
        state.update((name, value) for name, value in model.state_dict().items() if not name.startswith(_BACKBONE))
    return state


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    metadata: dict[str, Any] | None = None,
    task: str | None = None,
    classes: Sequence[str] | None = None,
) -> None:
    """Write what was trained to a file: adapters, neck and head.

    The file appears at once and complete, or not at all.

    Args:
        model: An adapted model, or an adapted backbone alone (then without
            neck and head). Of several adapters the active one is written.
        path: Where to write; ``.safetensors`` by custom.
        metadata: Notes of your own to keep with it (JSON).
        task: What it was trained for, in a word or two.
        classes: Names of the classes that its head tells apart.

    Raises:
        ValueError: The model is not adapted, or by a method that changes the
            backbone itself.
    """
    injection = get_injection(model)
    if injection is None:
        raise ValueError(f'{type(unwrap(model)).__name__} is not adapted: there is no adapter to save')
    if not injection.method.freezes:
        raise ValueError(
            f"method '{injection.method.name}' trains the backbone itself, so there is no adapter apart from it; "
            'save a checkpoint of the whole model'
        )
    content = describe_adapter(
        injection.method.config,
        [attachment.name for attachment in injection.attachments],
        describe_base(model),
        task=task,
        classes=classes,
        notes=metadata,
    )
    write_adapter(path, content, _tuned_state(model))


def describe_adapter(
    method: dict,
    sites: Sequence[str],
    base: dict[str, Any],
    task: str | None = None,
    classes: Sequence[str] | None = None,
    notes: dict | None = None,
) -> dict[str, Any]:
    """The metadata of an adapter file.

    Args:
        method: Config of the PEFT method.
        sites: Names of the adapted modules.
        base: What :func:`describe_base` gives.
        task: What it was trained for.
        classes: Names of the classes.
        notes: Anything else (JSON).
    """
    return dict(
        format_version=FORMAT_VERSION,
        package_version=__version__,
        method=method,
        sites=list(sites),
        **base,
        task=task,
        classes=None if classes is None else [str(name) for name in classes],
        notes=notes or {},
    )


def write_adapter(path: str | os.PathLike, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write an adapter file of its metadata and its tensors."""
    save_safetensors(tensors, path, metadata={_KEY: json.dumps(content)})


def read_adapter(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter file.

    Args:
        path: The file.

    Returns:
        Its metadata and its tensors.

    Raises:
        AdapterFileError: It is damaged, of another format or too new.
        FileNotFoundError: There is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f'adapter file {path} does not exist')
    try:
        metadata, tensors = read_safetensors(path)
    except DamagedFileError as error:
        raise AdapterFileError(str(error)) from error
    return parse_adapter(metadata, path), tensors


def is_adapter_file(metadata: dict[str, str]) -> bool:
    """Whether a safetensors file's metadata is that of an adapter file."""
    return _KEY in metadata


def parse_adapter(metadata: dict[str, str], path: str | os.PathLike) -> dict[str, Any]:
    """The content of an adapter file's metadata.

    Args:
        metadata: The metadata, as read.
        path: The file's name, for errors.

    Raises:
        AdapterFileError: It is that of another kind of file or too new.
    """
    if is_checkpoint(metadata):
        raise AdapterFileError(
            f'{path} is a training checkpoint, no adapter file; make one of it with `tools/adapter.py extract {path}`'
        )
    try:
        content = json.loads(metadata[_KEY])
        version = content['format_version']
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise AdapterFileError(
            f'{path} is a safetensors file, but no adapter file of iconformer_mm: its metadata lacks the key '
            f"'{_KEY}' with a method and a base"
        ) from error
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f'{path} has format version {version}, this iconformer_mm {__version__} reads version {FORMAT_VERSION}; '
            'install the release that wrote it or a newer one'
        )
    kinds: dict[str, type] = {'method': dict, 'sites': list, 'base_fingerprint': str, 'base_parameters': list}
    if 'base_buffers_fingerprint' in content or 'base_buffers' in content:
        kinds.update(base_buffers_fingerprint=str, base_buffers=list)
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            raise AdapterFileError(f'{path} is no intact adapter file: its metadata has no proper `{key}`')
    return content


def _check_adapters(model: nn.Module, method: dict, tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Compare a file's adapters with those its method would make, before memory is taken for them."""
    try:
        expected = adapter_shapes(model, method)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise AdapterFileError(f'{path} does not fit: its method {method} cannot be carried out: {error}') from error
    expected = {_BACKBONE + name: shape for name, shape in expected.items()}
    found = {n: v.shape for n, v in tensors.items() if n.startswith(_BACKBONE) and is_adapter(n)}
    if found != expected:
        name = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        have, want = (
            f'of shape {tuple(shapes[name])}' if name in shapes else 'missing' for shapes in (found, expected)
        )
        raise AdapterFileError(
            f'{path} does not fit: by its method {method}, {name} would be {want}, but in the file it is {have}'
        )


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    strict: bool = True,
    name: str | None = None,
    parts: dict[str, nn.Module | dict] | None = None,
) -> dict[str, Any]:
    """Load an adapter file into a model.

    An unadapted model is adapted with the file's method first. A backbone
    alone takes the adapters and leaves what the file has for neck and head; of
    a file of a backbone alone a whole model takes the adapters and keeps its
    neck and head. An error leaves the model as it was.

    Args:
        model: A model with the base weights the adapter was trained on.
        path: The file.
        strict: Whether another base, or tensors that are missing, left over or
            of another shape, are errors. Otherwise what fits is loaded, and
            the rest logged. Defaults to True.
        name: Adds an adapter of this name, beside those that are there, and
            loads the file into it. It stays inactive unless it is the first.
            Defaults to None: the active adapter takes the file.
        parts: With a name, neck and head for it where they differ from the
            model's present ones; see :func:`iconformer_mm.add_adapter`.

    Returns:
        The file's metadata.

    Raises:
        AdapterFileError: The file cannot be read or does not fit.
        FileNotFoundError: There is no such file.
        ValueError: The name is taken.
    """
    content, tensors = read_adapter(path)
    put_adapter(model, content, tensors, path, strict, name, parts)
    return content


def put_adapter(
    model: nn.Module,
    content: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str | os.PathLike,
    strict: bool = True,
    name: str | None = None,
    parts: dict[str, nn.Module | dict] | None = None,
) -> None:
    """Load the content of an adapter file into a model; see :func:`load_adapter`.

    Args:
        model: The model.
        content: The file's metadata.
        tensors: The file's tensors.
        path: The file's name, for errors.
        strict: Whether what does not fit is an error.
        name: Name of the adapter to add.
        parts: Neck and head for it.

    Raises:
        AdapterFileError: The file does not fit.
        ValueError: The name is taken.
    """
    model = unwrap(model)
    problems = []
    difference = base_difference(content, base_of(model)) or _unaccounted(content, tensors, model)
    if difference is not None:
        problems.append(f'it was trained on another base: {difference}. Load the weights it was trained on first')
        if strict:
            raise AdapterFileError(f'{path} does not fit: {problems[0]}')

    injection = get_injection(model)
    if name is None:
        if injection is not None and injection.current is None:
            raise ValueError('no adapter is active: set_adapter first, or give a name to load the file under')
        if injection is not None:
            _check_method(content['method'], injection.method.config, path)
    if injection is None or name is not None:
        _check_adapters(model, content['method'], tensors, path)

    before = active_adapter(model)
    parts_before = {part: getattr(model, part) for part in parts or {}}
    if name is not None:
        add_adapter(model, name, content['method'], parts)
        set_adapter(model, name)
    elif injection is None:
        inject(model, content['method'])
    trained_before = _trained(model)
    try:
        _adopt(model, tensors)
        _fill(model, tensors, problems, strict, path)
    except AdapterFileError:
        if injection is None:
            remove(model)
            for part, module in parts_before.items():
                setattr(model, part, module)
        else:
            adopt_output_norms(injection, trained_before)
            if name is not None:
                _switch_back(model, before)
                delete_adapter(model, name)
        raise
    if injection is not None and name is not None:
        _switch_back(model, before)


def _unaccounted(content: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module) -> str | None:
    """What the model's base has beyond the file's; None for nothing."""
    known = {*content['base_parameters'], *(n.removeprefix(_BACKBONE) for n in tensors)}
    extra = [n for n, _ in find_backbone(model).named_parameters() if not is_adapter(n) and n not in known]
    return f'the model has {extra[0]}, which that base had not ({len(extra)} such tensors)' if extra else None


def _check_method(theirs: dict, ours: dict, path: str | os.PathLike) -> None:
    """Compare a file's method with that of the model."""
    try:
        difference = method_difference(complete_method(theirs, str(path)), ours)
    except WeightsError as error:
        raise AdapterFileError(f'{path} does not fit: {error}') from error
    if difference:
        raise AdapterFileError(
            f'{path} holds {theirs}, the model is adapted by {ours}; to have both, give a name to load the file under'
        )


def _adopt(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Train in place what the file has of the base."""
    names = {n.removeprefix(_BACKBONE) for n in tensors if n.startswith(_BACKBONE) and not is_adapter(n)}
    injection = get_injection(model)
    assert injection is not None  # load_adapter has adapted the model
    if names or _trained(model):
        adopt_output_norms(injection, names)


def initialise_base(model: nn.Module, content: dict[str, Any]) -> str | None:
    """Have a model take the base that a file belongs to from its config, where it has not done so.

    In tests MMEngine leaves out what ``init_cfg`` says.

    Args:
        model: The bare model.
        content: What :func:`describe_base` gave, or metadata with it.

    Returns:
        How its base differs from the file's all the same, None for the same base.
    """
    difference = base_difference(content, base_of(model))
    if difference is not None and isinstance(model, BaseModule) and not model.is_init:
        model.init_weights()
        difference = base_difference(content, base_of(model))
    return difference


def _switch_back(model: nn.Module, name: str | None) -> None:
    """Make the adapter active that was, or none."""
    injection = get_injection(model)
    if name is not None:
        set_adapter(model, name)
    elif injection is not None:
        injection.activate(None)


def _fill(model: nn.Module, tensors: dict[str, Tensor], problems: list[str], strict: bool, path: Any) -> None:
    """Copy a file's tensors into the active adapter and what stands beside the backbone."""
    own = _tuned_state(model)
    if find_backbone(model) is model:
        tensors = {name: value for name, value in tensors.items() if name.startswith(_BACKBONE)}
    elif all(name.startswith(_BACKBONE) for name in tensors):  # a file of a backbone alone
        own = {name: value for name, value in own.items() if name.startswith(_BACKBONE)}
    fitting = {
        n: v
        for n, v in tensors.items()
        if n in own and own[n].shape == v.shape and own[n].is_floating_point() == v.is_floating_point()
    }
    for what, names in {
        'missing in the file': own.keys() - tensors.keys(),
        'unknown to the model': tensors.keys() - own.keys(),
        'of another shape or kind': (tensors.keys() & own.keys()) - fitting.keys(),
    }.items():
        if names:
            problems.append(f'{len(names)} tensors are {what}, such as {min(names)}')
    if problems and strict:
        hint = '. A head of other classes can be given as `parts`' if 'of another shape' in problems[-1] else ''
        raise AdapterFileError(f'{path} does not fit: {"; ".join(problems)}{hint}')
    if problems:
        print_log(f'{path} fits in part: {"; ".join(problems)}', logger='current', level=logging.WARNING)
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
