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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from iconformer_mm.tuning.backbones import find_backbones, join
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import adapt, adapter_shapes, backbones_of, get_injection, remove, unwrap
from iconformer_mm.tuning.methods import build_method
from iconformer_mm.tuning.selection import Selection, matches
from iconformer_mm.tuning.switching import active_adapter, add_selected, delete_adapter, set_adapter
from iconformer_mm.version import __version__

from .safetensors_io import DamagedFileError, read_safetensors, save_safetensors
from .training_checkpoint import is_checkpoint
from .tuned_state import base_state, file_names, heads_of, tuned_state

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


def base_parameters(model: nn.Module, selection: Selection | None = None) -> dict[str, Tensor]:
    """The backbone's own parameters that are not trained, by their names in it; of several, with the backbone's path.

    Args:
        model: A model, or a backbone alone.
        selection: What an unadapted model would be adapted with.
    """
    backbones = backbones_of(model) if selection is None else _backbones_for(model, selection)
    several = len(backbones) > 1
    parameters = {join(p, n) if several else n for p, b in backbones.items() for n, _ in b.named_parameters()}
    return {n: v for n, v in base_state(model, selection).items() if n in parameters}


def _backbones_for(model: nn.Module, selection: Selection) -> dict[str, nn.Module]:
    model = unwrap(model)
    return backbones_of(model) if get_injection(model) else find_backbones(model, selection.backbones)


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
            backbone itself, or drops tensors of adapters from its state dict.
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
        list(injection.named_attachments()),
        base_parameters(model),
        task=task,
        classes=classes,
        notes=metadata,
        selection=injection.selection.config,
        backbones=list(backbones_of(model)),
    )
    write_adapter(path, content, tuned_state(model))


def describe_adapter(
    method: dict,
    sites: Sequence[str],
    base: dict[str, Tensor] | tuple[str, list[str]],
    task: str | None = None,
    classes: Sequence[str] | None = None,
    notes: dict | None = None,
    selection: dict | None = None,
    backbones: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The metadata of an adapter file.

    Args:
        method: Config of the PEFT method.
        sites: Names of the adapted modules.
        base: The base's parameters by name, or their fingerprint and names.
        task: What it was trained for.
        classes: Names of the classes.
        notes: Anything else (JSON).
        selection: Config of what was selected beside the method.
        backbones: Paths of the backbones in the model.
    """
    base_fingerprint, names = base if isinstance(base, tuple) else (hash_parameters(base), sorted(base))
    return dict(
        format_version=FORMAT_VERSION,
        package_version=__version__,
        method=method,
        sites=list(sites),
        base_fingerprint=base_fingerprint,
        base_parameters=list(names),
        task=task,
        classes=None if classes is None else [str(name) for name in classes],
        notes=notes or {},
        selection=selection or {},
        backbones=[_BACKBONE[:-1]] if backbones is None else list(backbones),
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
    for key, kind in {'method': dict, 'sites': list, 'base_fingerprint': str, 'base_parameters': list}.items():
        if not isinstance(content.get(key), kind):
            raise AdapterFileError(f'{path} is no intact adapter file: its metadata has no proper `{key}`')
    return content


def _selection_of(content: dict[str, Any], model: nn.Module, path: str | os.PathLike) -> Selection:
    """What a file says was selected, for a model to be adapted by it.

    Files of releases that knew no selection held classifiers in the backbone for base. Paths of backbones count where
    the model has them; a file of a single backbone fits one that is found otherwise.
    """
    try:
        selection = Selection.from_config(content.get('selection'))
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f'{path} is no intact adapter file: {error}') from error
    if 'selection' not in content:
        heads = heads_of(model, selection)
        held = any(name.startswith(f'{head}.') for name in content['base_parameters'] for head in heads)
        selection = replace(selection, classifiers=not held)
    paths = selection.backbones or ()
    if len(paths) == 1 and paths[0] not in dict(model.named_modules()):
        selection = replace(selection, backbones=None)
    return _fitting_freeze(selection, model)


def _fitting_freeze(selection: Selection, model: nn.Module) -> Selection:
    """Leave out patterns of what the model does not have, such as a head where a backbone alone is given."""
    names = [name for name, _ in model.named_parameters()]
    return replace(selection, freeze=tuple(p for p in selection.freeze if any(matches(n, p) for n in names)))


def _check_adapters(
    model: nn.Module,
    method: dict,
    selection: Selection,
    tensors: dict[str, Tensor],
    path: str | os.PathLike,
    strict: bool = True,
) -> None:
    """Compare a file's adapters with those its method would make, before memory is taken for them.

    If not strict, what differs is left to :func:`_fill`. A method that would take far more memory than the file has
    adapters for is refused all the same.
    """
    try:
        shapes = adapter_shapes(model, method, selection)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise AdapterFileError(f'{path} does not fit: its method {method} cannot be carried out: {error}') from error
    backbones = list(_backbones_for(model, selection))
    full = {join(backbones[0], name) if len(backbones) == 1 else name: shape for name, shape in shapes.items()}
    names = file_names([*unwrap(model).state_dict(), *full], backbones, heads_of(model, selection))
    expected = {names[name]: shape for name, shape in full.items()}
    inside = tuple({name.partition('.')[0] + '.' for name in expected})
    found = {n: v.shape for n, v in tensors.items() if n.startswith(inside) and is_adapter(n)}
    sizes = [sum(shape.numel() for shape in shapes.values()) for shapes in (found, expected)]
    if found != expected and (strict or sizes[1] > 16 * sizes[0] + 2**20):
        name = min(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
        have, want = (
            f'of shape {tuple(shapes[name])}' if name in shapes else 'missing' for shapes in (found, expected)
        )
        raise AdapterFileError(
            f'{path} does not fit: by its method {method}, {name} would be {want}, but in the file it is {have}'
        )


def _check_selection(content: dict[str, Any], model: nn.Module, path: str | os.PathLike) -> None:
    """Compare what a file adapts and trains with what the adapted model does."""
    injection = get_injection(model)
    assert injection is not None
    try:
        theirs = Selection.from_config(content.get('selection'))
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f'{path} is no intact adapter file: {error}') from error
    ours = injection.selection
    for option in ('blocks', 'unfreeze'):
        if getattr(theirs, option) != getattr(ours, option):
            if option == 'blocks' and set(content['sites']) == set(injection.named_attachments()):
                continue  # the same, said otherwise
            raise AdapterFileError(
                f'{path} does not fit: it was trained with {option}={getattr(theirs, option)!r}, the model is adapted '
                f'with {option}={getattr(ours, option)!r}'
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
        ValueError: The name is taken, or there are parts without a name.
    """
    if parts and name is None:
        raise ValueError(
            f'`parts` ({", ".join(parts)}) are for an adapter of its own: give its `name`, too, as in '
            "load_adapter(model, path, name='cars', parts=...)"
        )
    content, tensors = read_adapter(path)
    model = unwrap(model)
    injection = get_injection(model)
    if injection is not None and name is None:
        _check_selection(content, model, path)
    selection = _selection_of(content, model, path)
    if injection is not None and name is not None and selection.unfreeze:
        raise AdapterFileError(
            f'{path} has parameters of the base itself, trained in place ({selection.unfreeze[0]}, ...), so it cannot '
            'share a base with other adapters: load it into a model of its own'
        )
    problems = []
    try:
        actual = hash_parameters(base_parameters(model, None if injection else selection))
    except ValueError as error:
        raise AdapterFileError(f'{path} does not fit: {error}') from error
    if not same_base(content['base_fingerprint'], actual):
        problems.append(
            f'it was trained on another base: the base weights have fingerprint {actual[:12]}, the adapter needs '
            f'{content["base_fingerprint"][:12]}. Load the weights it was trained on first'
        )
        if strict:
            raise AdapterFileError(f'{path} does not fit: {problems[0]}')

    if name is None:
        if injection is not None and injection.current is None:
            raise ValueError('no adapter is active: set_adapter first, or give a name to load the file under')
        if injection is not None and injection.method.config != _complete(content['method'], path):
            raise AdapterFileError(
                f'{path} holds {content["method"]}, the model is adapted by {injection.method.config}; to have both, '
                'give a name to load the file under'
            )
    if injection is None or name is not None:
        _check_adapters(model, content['method'], selection, tensors, path, strict)

    before = active_adapter(model)
    parts_before = {part: model.get_submodule(part) for part in parts or {}}
    try:
        if name is not None:
            add_selected(model, name, content['method'], parts, selection)
            set_adapter(model, name)
        elif injection is None:
            adapt(model, build_method(content['method']), selection)
    except ValueError as error:
        if injection is None:
            raise AdapterFileError(f'{path} does not fit: {error}') from error
        raise
    try:
        _fill(model, tensors, problems, strict, path)
    except AdapterFileError:
        if injection is None:
            remove(model)
            for part, module in parts_before.items():
                parent, _, last = part.rpartition('.')
                setattr(model.get_submodule(parent), last, module)
        elif name is not None:
            _switch_back(model, before)
            delete_adapter(model, name)
        raise
    if injection is not None and name is not None:
        _switch_back(model, before)
    return content


def _complete(method: dict, path: str | os.PathLike) -> dict:
    """The config of a file's method, with options that came after it was written."""
    try:
        return build_method(method).config
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f'{path} does not fit: its method {method} cannot be carried out: {error}') from error


def _switch_back(model: nn.Module, name: str | None) -> None:
    """Make the adapter active that was, or none."""
    injection = get_injection(model)
    if name is not None:
        set_adapter(model, name)
    elif injection is not None:
        injection.activate(None)


def _fill(model: nn.Module, tensors: dict[str, Tensor], problems: list[str], strict: bool, path: Any) -> None:
    """Copy a file's tensors into the active adapter and what stands beside the backbone."""
    injection = get_injection(model)
    assert injection is not None  # load_adapter has adapted the model
    own = tuned_state(model)
    backbones = list(backbones_of(model))
    heads = heads_of(model)
    inside = _inside(backbones, heads, own)
    heads_in_file = [n for n in tensors if not _is_inside(n, inside, heads)]
    heads_here = [n for n in own if not _is_inside(n, inside, heads)]
    if not heads_here:  # a backbone alone
        tensors = {n: v for n, v in tensors.items() if n not in heads_in_file}
    elif not heads_in_file:  # a file of a backbone alone
        own = {n: v for n, v in own.items() if n not in heads_here}
    for base in injection.trained.values():
        base.begin()
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


def _inside(backbones: list[str], heads: list[str], own: dict[str, Tensor]) -> tuple[str, ...]:
    """What the names of tensors in backbones begin with, in a file for a model."""
    if len(backbones) > 1:
        return tuple(f'{path}.' for path in backbones)
    path = f'{backbones[0]}.'
    return (path,) if path != '.' and any(n.startswith(path) and is_adapter(n) for n in own) else (_BACKBONE,)


def _is_inside(name: str, inside: tuple[str, ...], heads: list[str]) -> bool:
    return name.startswith(inside) and not any(name.startswith(f'{head}.') for head in heads)
