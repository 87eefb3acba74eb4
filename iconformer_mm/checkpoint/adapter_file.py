"""Adapter files: the trained tensors, the method that uses them, and the base they belong to.

An adapter file is a safetensors file. It holds the adapters as
``backbone.<name in the backbone>``, and the modules outside the backbone (neck
and head) under their own names. Its metadata has one key, ``iconformer_mm``,
whose value is JSON.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from torch import Tensor, nn

from iconformer_mm.files import expanded
from iconformer_mm.tuning.accounting import (
    WeightsError,
    adopt_output_norms,
    check_selection,
    complete_method,
    is_derived,
    method_difference,
    tell_precision,
)
from iconformer_mm.tuning.backbones import find_backbones, join
from iconformer_mm.tuning.fingerprint import UnknownBaseError, hash_parameters, same_base
from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.frozen_precision import check_frozen_dtype
from iconformer_mm.tuning.injection import (
    adapt,
    adapter_shapes,
    backbones_of,
    get_injection,
    hold_base,
    remove,
    unwrap,
)
from iconformer_mm.tuning.methods import build_method
from iconformer_mm.tuning.quantised_weight import named_weights
from iconformer_mm.tuning.selection import Selection, matches
from iconformer_mm.tuning.switching import add_selected, delete_adapter
from iconformer_mm.version import __version__

from .divergence import diverged_error, find_diverged
from .safetensors_io import DamagedFileError, parse_json, read_safetensors, save_safetensors, shortened
from .sharded import wholes
from .training_checkpoint import is_checkpoint
from .tuned_state import base_state, file_names, heads_of, tuned_state

# Version 2: LoRA and DoRA run as parallel paths, and adapters after a branch read the output of that branch. For files
# of version 1 with these methods, outputs therefore differ by rounding (about 1e-6). Nothing else changed.
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
_KEY = 'iconformer_mm'
_BACKBONE = 'backbone.'


class AdapterFileError(ValueError):
    """An adapter file cannot be read, or does not fit the model."""


def fingerprint(model: nn.Module) -> str:
    """Identify the base weights: the backbone's own parameters, without adapters.

    Names and values are hashed. The values are rounded once to bfloat16 and
    once to float16, so a copy in half precision is recognised, too. The result
    does not depend on the device or on the order of the parameters. A quantised base
    (``frozen_dtype='int8'``) has the fingerprint that it had before.

    Args:
        model: A model, or a backbone alone.

    Returns:
        Two halves of 32 hexadecimal digits: the start of the SHA-256 with
        bfloat16, then with float16. Compare them with :func:`same_base`.
    """
    return hash_parameters(base_parameters(model))


def base_parameters(model: nn.Module, selection: Selection | None = None) -> dict[str, Tensor]:
    """Return the backbone's own parameters that are not trained, by their names in the backbone.

    With several backbones, each name starts with the backbone's path.

    Args:
        model: A model, or a backbone alone.
        selection: The selection that an unadapted model would be adapted with.
    """
    backbones = backbones_of(model) if selection is None else _backbones_for(model, selection)
    several = len(backbones) > 1
    parameters = {join(p, n) if several else n for p, b in backbones.items() for n, _ in named_weights(b)}
    return {n: v for n, v in base_state(model, selection).items() if n in parameters}


def _backbones_for(model: nn.Module, selection: Selection) -> dict[str, nn.Module]:
    model = unwrap(model)
    return backbones_of(model) if get_injection(model) else find_backbones(model, selection.backbones)


def describe_base(model: nn.Module) -> dict[str, Any]:
    """Describe the base of an adapter, for the metadata of its file.

    Args:
        model: A model, or a backbone alone.

    Returns:
        ``base_fingerprint`` and ``base_parameters``, the fingerprint and the names of the parameters. If the base has
        learned buffers (running statistics), also ``base_buffers_fingerprint`` and ``base_buffers``. Counters and
        indices are left out: evaluation does not read counters, and indices follow from the architecture.
    """
    parameters, own = base_parameters(model), base_state(model)
    buffers = {n: v for n, v in own.items() if n not in parameters and v.is_floating_point() and not is_derived(n)}
    base: dict[str, Any] = dict(base_fingerprint=hash_parameters(parameters), base_parameters=sorted(parameters))
    if buffers:
        base.update(base_buffers_fingerprint=hash_parameters(buffers), base_buffers=sorted(buffers))
    return base


def base_difference(content: dict[str, Any], tensors: dict[str, Tensor]) -> str | None:
    """Describe how a base differs from the base of a file.

    Args:
        content: The result of :func:`describe_base`, or metadata that includes it. Older files lack the keys of
            buffers. For them, only parameters are compared.
        tensors: Parameters and buffers of the base, by their names in the backbone.

    Returns:
        The difference in words; None for the same base.
    """
    for what, prints, names in (
        ('weights have', 'base_fingerprint', 'base_parameters'),
        ('buffers (running statistics) have', 'base_buffers_fingerprint', 'base_buffers'),
    ):
        if prints not in content:
            continue
        missing = [name for name in content[names] if name not in tensors]
        if missing:
            return (
                f'the base has no {shortened(missing[0])} ({len(missing)} of {len(content[names])} tensors are missing)'
            )
        try:
            actual = hash_parameters({name: tensors[name] for name in content[names]})
        except UnknownBaseError as error:
            return str(error)
        if not same_base(content[prints], actual):
            needed = shortened(content[prints][:12])
            return f'the base {what} fingerprint {actual[:12]}, the adapter needs {needed}'
    return None


def base_of(model: nn.Module, selection: Selection | None = None) -> dict[str, Tensor]:
    """Return the tensors that :func:`base_difference` compares: those of a model's backbone, without adapters.

    Args:
        model: A model, or a backbone alone.
        selection: The selection that an unadapted model would be adapted with. Defaults to None.
    """
    return base_state(model, selection, with_trained=True)


def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    metadata: dict[str, Any] | None = None,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> None:
    """Write the trained tensors to a file: adapters, neck and head.

    The file is written atomically: the complete file appears, or none.

    Args:
        model: An adapted model, or an adapted backbone alone. A backbone alone
            has no neck and head to write.
        path: Where to write. ``~`` is expanded; ``.safetensors`` is the usual suffix.
        metadata: Your own notes to store with it (JSON).
        task: What it was trained for, in a word or two.
        classes: Names of the classes that its head predicts.
        name: The adapter to write, if there are several. Defaults to None: the active one.

    Raises:
        ValueError: The model is not adapted, its method changes the backbone
            itself, its state dict lacks tensors of adapters, or its training
            diverged and tensors hold NaN or infinite values. An existing file
            is kept.
    """
    content, tensors = adapter_of(model, metadata, task, classes, name)
    write_adapter(path, content, tensors)


def adapter_of(
    model: nn.Module,
    metadata: dict[str, Any] | None = None,
    task: str | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    base: dict[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what :func:`save_adapter` writes. A sharded model is gathered, for which all processes must call this.

    Args:
        model: An adapted model, or an adapted backbone alone.
        metadata: Your own notes.
        task: What it was trained for.
        classes: Names of the classes.
        name: The adapter. Defaults to None: the active one.
        base: The result of :func:`describe_base` from before the model was sharded. Defaults to None: it is not
            sharded.

    Returns:
        The metadata and the tensors.

    Raises:
        ValueError: As :func:`save_adapter`.
    """
    injection = get_injection(model)
    if injection is None:
        raise ValueError(f'{type(unwrap(model)).__name__} is not adapted: there is no adapter to save')
    if name is not None and name not in injection.adapters:
        raise ValueError(f"there is no adapter '{name}'; there are: {', '.join(injection.adapters)}")
    if not injection.method.freezes:
        raise ValueError(
            f"method '{injection.method.name}' trains the backbone itself, so there is no adapter apart from it; "
            'save a checkpoint of the whole model'
        )
    adapter = injection.adapters.get(name or injection.active or '')
    content = describe_adapter(
        adapter.method.config if adapter else injection.method.config,
        list(injection.named_attachments(name)),
        describe_base(model) if base is None else base,
        task=task,
        classes=classes,
        notes=metadata,
        selection=(adapter or injection).selection.config,
        backbones=list(backbones_of(model)),
        base_dtype=injection.frozen_dtype,
    )
    return content, wholes(tuned_state(model, name))


def describe_adapter(
    method: dict,
    sites: Sequence[str],
    base: dict[str, Any],
    task: str | None = None,
    classes: Sequence[str] | None = None,
    notes: dict | None = None,
    selection: dict | None = None,
    backbones: Sequence[str] | None = None,
    base_dtype: str | None = None,
) -> dict[str, Any]:
    """Build the metadata of an adapter file.

    Args:
        method: Config of the PEFT method.
        sites: Names of the adapted modules.
        base: The result of :func:`describe_base`.
        task: What it was trained for.
        classes: Names of the classes.
        notes: Any other data (JSON).
        selection: Config of the :class:`~iconformer_mm.tuning.selection.Selection`.
        backbones: Paths of the backbones in the model.
        base_dtype: The precision that the base was held in, None for that of its weights.
    """
    return dict(
        format_version=FORMAT_VERSION,
        package_version=__version__,
        method=method,
        sites=list(sites),
        **base,
        base_dtype=base_dtype,
        task=task,
        classes=None if classes is None else [str(name) for name in classes],
        notes=notes or {},
        selection=selection or {},
        backbones=[_BACKBONE[:-1]] if backbones is None else list(backbones),
    )


def write_adapter(path: str | os.PathLike, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write an adapter file from its metadata and its tensors.

    Raises:
        ValueError: The metadata is not JSON, or tensors hold NaN or infinite values.
    """
    diverged = find_diverged(tensors)
    if diverged:
        raise ValueError(f'{path} is not written: its training diverged, {diverged_error(diverged)}')
    try:
        text = json.dumps(content, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f'the metadata of an adapter file must be JSON: {error}') from error
    save_safetensors(tensors, path, metadata={_KEY: text})


def read_adapter(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter file.

    Args:
        path: The file.

    Returns:
        The metadata and the tensors.

    Raises:
        AdapterFileError: The file is damaged, not an adapter file, or too new.
        FileNotFoundError: The file does not exist.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f'adapter file {path} does not exist')
    try:
        metadata, tensors = read_safetensors(path)
    except DamagedFileError as error:
        raise AdapterFileError(str(error)) from error
    return parse_adapter(metadata, path), tensors


def is_adapter_file(metadata: dict[str, str]) -> bool:
    """Whether the metadata of a safetensors file belongs to an adapter file."""
    return _KEY in metadata


def parse_adapter(metadata: dict[str, str], path: str | os.PathLike) -> dict[str, Any]:
    """Parse and check the metadata of an adapter file.

    Args:
        metadata: The metadata, as read.
        path: The file's name, for error messages.

    Raises:
        AdapterFileError: The metadata is damaged, too new, or belongs to another kind of file.
    """
    if is_checkpoint(metadata):
        raise AdapterFileError(
            f'{path} is a training checkpoint, not an adapter file; extract one with `tools/adapter.py extract {path}`'
        )
    if _KEY not in metadata:
        raise AdapterFileError(
            f'{path} is a safetensors file, but not an adapter file of iconformer_mm: its metadata lacks the key '
            f"'{_KEY}' with a method and a base"
        )
    try:
        content = parse_json(metadata[_KEY])
        version = content['format_version']
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(
            f"{path} is not a valid adapter file: its metadata '{_KEY}' cannot be read: {type(error).__name__}: "
            f'{shortened(str(error))}'
        ) from error
    if type(version) is not int or version not in READABLE_VERSIONS:
        raise AdapterFileError(
            f'{path} has format version {shortened(version, 20)}, this iconformer_mm {__version__} reads version '
            f'{FORMAT_VERSION}. Install the release that wrote the file, or a newer one'
        )
    buffers = ('base_buffers', 'base_buffers_fingerprint')
    for key, other in (buffers, buffers[::-1]):
        if other in content and key not in content:
            raise AdapterFileError(f'{path} is not a valid adapter file: its metadata has no valid `{key}`')
    fault = next((key for key, is_proper in _PROPER.items() if not is_proper(content.get(key))), None)
    if fault is not None:
        raise AdapterFileError(f'{path} is not a valid adapter file: its metadata has no valid `{fault}`')
    return content


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


# Checks of the metadata values.
_PROPER: dict[str, Callable[[Any], bool]] = {
    'method': lambda value: isinstance(value, dict) and isinstance(value.get('type'), str),
    'sites': _are_texts,
    'base_fingerprint': _is_text,
    'base_parameters': _are_texts,
    'base_buffers_fingerprint': lambda value: value is None or _is_text(value),
    'base_buffers': lambda value: value is None or _are_texts(value),
    'base_dtype': lambda value: value is None or _is_text(value),
    'selection': lambda value: value is None or isinstance(value, dict),
    'backbones': lambda value: value is None or (_are_texts(value) and bool(value)),
    'package_version': lambda value: value is None or _is_text(value),
    'task': lambda value: value is None or _is_text(value),
    'classes': lambda value: value is None or _are_texts(value),
    'notes': lambda value: value is None or isinstance(value, dict),
}


def _selection_of(content: dict[str, Any], model: nn.Module, path: str | os.PathLike) -> Selection:
    """Read a file's selection, for adapting a model with it.

    Releases without selections treated classifiers inside the backbone as base. The file's backbone paths apply if the
    model has them. If the file has a single backbone whose path the model lacks, the model's backbone is searched for.
    """
    try:
        selection = Selection.from_config(content.get('selection'))
    except (ValueError, TypeError) as error:
        raise AdapterFileError(f'{path} is not a valid adapter file: {error}') from error
    if 'selection' not in content:
        heads = heads_of(model, selection)
        held = any(name.startswith(f'{head}.') for name in content['base_parameters'] for head in heads)
        selection = replace(selection, classifiers=not held)
    paths = selection.backbones or ()
    if len(paths) == 1 and paths[0] not in dict(model.named_modules()):
        selection = replace(selection, backbones=None)
    return _fitting_freeze(selection, model)


def _fitting_freeze(selection: Selection, model: nn.Module) -> Selection:
    """Drop patterns that match nothing in the model, such as those of a head if the model is a backbone alone."""
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
    """Compare a file's adapters with those its method would create, before memory is allocated for them.

    If not strict, :func:`_fill` handles differences. A method that would allocate far more memory than the file's
    adapters need is refused anyway.
    """
    try:
        shapes = adapter_shapes(model, method, selection)
    except _IMPOSSIBLE as error:
        raise _impossible(path, method, error) from error
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
            f'{path} does not fit: by its method {shortened(method)}, {shortened(name)} should be {want}, but in the '
            f'file it is {have}'
        )


# Exceptions of a method with impossible options.
_IMPOSSIBLE = (ValueError, TypeError, RuntimeError, OverflowError, AttributeError, LookupError, MemoryError)


def _impossible(path: str | os.PathLike, method: dict, error: Exception) -> AdapterFileError:
    return AdapterFileError(
        f'{path} does not fit: its method {shortened(method)} cannot be applied: {shortened(str(error), 500)}'
    )


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    strict: bool = True,
    name: str | None = None,
    parts: dict[str, nn.Module | dict] | None = None,
    frozen_dtype: str | None = None,
) -> dict[str, Any]:
    """Load an adapter file into a model.

    An unadapted model is first adapted with the file's method. If the model is
    a backbone alone, the file's neck and head are ignored. If the file is of a
    backbone alone, the model keeps its neck and head. An error leaves the model
    unchanged.

    Args:
        model: A model with the base weights that the adapter was trained on.
        path: The file.
        strict: Whether a different base, or missing, unexpected or wrongly
            shaped tensors, are errors. If False, everything that fits is loaded
            and the rest is logged. Defaults to True.
        name: Add a new adapter of this name, next to the existing ones, and
            load the file into it. It stays inactive unless it is the first.
            Defaults to None: load the file into the active adapter.
        parts: Neck and head for the new adapter, where they differ from the
            model's current ones; see :func:`iconformer_mm.add_adapter`. They
            require a name.
        frozen_dtype: The precision to hold the base of an unadapted model in, see
            :func:`iconformer_mm.inject`. If it differs from the one that the file was trained
            under, outputs differ by rounding, and a warning says so. Defaults to None, as it is.

    Returns:
        The file's metadata.

    Raises:
        AdapterFileError: The file cannot be read or does not fit.
        FileNotFoundError: The file does not exist.
        MissingExtraError: ``frozen_dtype`` needs torchao, which is not installed or too old.
        ValueError: The name is taken, ``parts`` are given without a name,
            no adapter is active to load into, or ``frozen_dtype`` is given for an adapted model.
    """
    if parts and name is None:
        raise ValueError(
            f'`parts` ({", ".join(parts)}) belong to a new adapter: give its `name`, too, as in '
            "load_adapter(model, path, name='cars', parts=...)"
        )
    content, tensors = read_adapter(path)
    put_adapter(model, content, tensors, path, strict, name, parts, frozen_dtype)
    return content


def put_adapter(
    model: nn.Module,
    content: dict[str, Any],
    tensors: dict[str, Tensor],
    path: str | os.PathLike,
    strict: bool = True,
    name: str | None = None,
    parts: dict[str, nn.Module | dict] | None = None,
    frozen_dtype: str | None = None,
) -> None:
    """Load the content of an adapter file into a model; see :func:`load_adapter`.

    Args:
        model: The model.
        content: The file's metadata.
        tensors: The file's tensors.
        path: The file's name, for error messages.
        strict: Whether anything that does not fit is an error. Defaults to True.
        name: Name of the adapter to add. Defaults to None: load into the active one.
        parts: Neck and head for the new adapter. Defaults to None.
        frozen_dtype: The precision to hold the base of an unadapted model in. Defaults to None, as it is.

    Raises:
        AdapterFileError: The file does not fit.
        MissingExtraError: ``frozen_dtype`` needs torchao, which is not installed or too old.
        ValueError: The name is taken, no adapter is active to load into, or ``frozen_dtype`` is unknown or given for
            an adapted model.
    """
    model = unwrap(model)
    injection = get_injection(model)
    if frozen_dtype is not None:
        check_frozen_dtype(frozen_dtype)
    if frozen_dtype is not None and injection is not None and frozen_dtype != injection.frozen_dtype:
        raise ValueError(
            f'frozen_dtype={frozen_dtype!r} holds the base of an unadapted model, and this one is adapted with '
            f'frozen_dtype={injection.frozen_dtype!r}; call remove(model) first, or leave the option out'
        )
    if injection is not None and name is None:
        try:
            check_selection(content, injection, str(path))
        except WeightsError as error:
            raise AdapterFileError(f'{path} does not fit: {error}') from error
    selection = _selection_of(content, model, path)
    if injection is not None and name is not None and selection.unfreeze:
        raise AdapterFileError(
            f'{path} holds base parameters that were trained in place ({selection.unfreeze[0]}, ...), so it cannot '
            'share a base with other adapters: load it into a separate model'
        )
    norms = _base_names(model, tensors, selection) - set(content['base_parameters'])
    if injection is not None and name is not None and norms:
        raise AdapterFileError(
            f'{path} has norms of the backbone that its base lacked ({min(norms)}, ...), so it cannot share a base '
            'with other adapters: load it into a separate model'
        )
    problems = []
    try:
        own = base_of(model, None if injection else selection)
        extra = _unaccounted(content, tensors, model, None if injection else selection)
    except ValueError as error:
        raise AdapterFileError(f'{path} does not fit: {error}') from error
    difference = base_difference(content, own) or extra
    if difference is not None:
        problems.append(f'it was trained on another base: {difference}. Load the weights it was trained on first')
        if strict:
            raise AdapterFileError(f'{path} does not fit: {problems[0]}')

    if name is None:
        if injection is not None and injection.current is None:
            raise ValueError('no adapter is active: set_adapter first, or give a name to load the file under')
        if injection is not None:
            _check_method(content['method'], injection.method.config, path)
    if injection is None or name is not None:
        _check_adapters(model, content['method'], selection, tensors, path, strict)

    parts_before = {part: model.get_submodule(part) for part in parts or {}}
    try:
        if name is not None:
            add_selected(model, name, content['method'], parts, selection, frozen_dtype, hold=False)
        elif injection is None:
            adapt(model, build_method(content['method']), selection, frozen_dtype, hold=False)
    except ValueError as error:
        if injection is None:
            raise AdapterFileError(f'{path} does not fit: {error}') from error
        raise
    adapted = get_injection(model)
    assert adapted is not None  # adapted above
    trained_before = adapted.trained_norms()
    try:
        if injection is None or name is None:
            _adopt(model, tensors)
        _fill(model, tensors, problems, strict, path, name)
    except AdapterFileError:
        if injection is None:
            remove(model)
            for part, module in parts_before.items():
                parent, _, last = part.rpartition('.')
                setattr(model.get_submodule(parent), last, module)
        elif name is None:
            adopt_output_norms(injection, trained_before)
        else:
            delete_adapter(model, name)
        raise
    hold_base(model)  # an error before this leaves the base as it was
    tell_precision(content, adapted.frozen_dtype, str(path))


def _base_names(model: nn.Module, tensors: dict[str, Tensor], selection: Selection) -> set[str]:
    """Return the base tensors in a file, by their names in the backbone, with its path if there are several."""
    backbones = list(_backbones_for(model, selection))
    heads = heads_of(model, selection)
    inside = _inside(backbones, heads, tensors)
    own = {n for n in tensors if _is_inside(n, inside, heads) and not is_adapter(n)}
    return own if len(backbones) > 1 else {n[len(inside[0]) :] for n in own}


def _unaccounted(
    content: dict[str, Any], tensors: dict[str, Tensor], model: nn.Module, selection: Selection | None
) -> str | None:
    """Describe what the model's base has beyond the file's base; None for nothing."""
    known = {*content['base_parameters'], *_base_names(model, tensors, selection or Selection())}
    extra = [name for name in base_parameters(model, selection) if name not in known]
    return f'the model has {extra[0]}, which that base lacked ({len(extra)} such tensors)' if extra else None


def _check_method(theirs: dict, ours: dict, path: str | os.PathLike) -> None:
    """Compare a file's method with the model's method."""
    try:
        difference = method_difference(complete_method(theirs, str(path)), ours)
    except WeightsError as error:
        raise AdapterFileError(f'{path} does not fit: {error}') from error
    if difference:
        raise AdapterFileError(
            f'{path} holds {theirs}, but the model is adapted by {ours}. To have both, give a name to load the file '
            'under'
        )


def _adopt(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Make the base tensors that the file holds trainable in place."""
    injection = get_injection(model)
    assert injection is not None  # load_adapter has adapted the model
    names = _base_names(model, tensors, injection.selection)
    if names or injection.trained_norms():
        adopt_output_norms(injection, names)


def initialise_base(model: nn.Module, content: dict[str, Any]) -> str | None:
    """Load a model's base from its config, unless it already has the base of the file.

    In tests, MMEngine does not apply ``init_cfg``.

    Args:
        model: The bare model.
        content: The result of :func:`describe_base`, or metadata that includes it.

    Returns:
        How the model's base still differs from the file's; None for the same base.
    """
    difference = base_difference(content, base_of(model))
    if difference is not None and isinstance(model, BaseModule) and not model.is_init:
        model.init_weights()
        difference = base_difference(content, base_of(model))
    return difference


def _fill(
    model: nn.Module, tensors: dict[str, Tensor], problems: list[str], strict: bool, path: Any, name: str | None
) -> None:
    """Copy a file's tensors into an adapter with its neck and head. Without a name, the active adapter."""
    injection = get_injection(model)
    assert injection is not None  # load_adapter has adapted the model
    own = tuned_state(model, name)
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
            problems.append(f'{len(names)} tensors are {what}, such as {shortened(min(names))}')
    if problems and strict:
        hint = '. A head for other classes can be given as `parts`' if 'of another shape' in problems[-1] else ''
        raise AdapterFileError(f'{path} does not fit: {"; ".join(problems)}{hint}')
    if problems:
        print_log(f'{path} fits in part: {"; ".join(problems)}', logger='current', level=logging.WARNING)
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)


def _inside(backbones: list[str], heads: list[str], own: dict[str, Tensor]) -> tuple[str, ...]:
    """Return the prefixes of the backbones' tensor names in a file for a model."""
    if len(backbones) > 1:
        return tuple(f'{path}.' for path in backbones)
    path = f'{backbones[0]}.'
    return (path,) if path != '.' and any(n.startswith(path) and is_adapter(n) for n in own) else (_BACKBONE,)


def _is_inside(name: str, inside: tuple[str, ...], heads: list[str]) -> bool:
    return name.startswith(inside) and not any(name.startswith(f'{head}.') for head in heads)
