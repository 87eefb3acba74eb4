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
from pathlib import Path
from typing import Any

import safetensors
import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from iconformer_mm.tuning.freezing import is_adapter
from iconformer_mm.tuning.injection import find_backbone, get_injection, inject, remove, unwrap
from iconformer_mm.version import __version__

from .safetensors_io import save_safetensors

FORMAT_VERSION = 1
_KEY = 'iconformer_mm'
_BACKBONE = 'backbone.'


class AdapterFileError(ValueError):
    """An adapter file cannot be read, or does not fit the model."""


def fingerprint(model: nn.Module) -> str:
    """Identify the base weights: the backbone's own parameters, without adapters.

    The same for any device, any order of parameters, and for float32 weights
    and their bfloat16 copy: names and values rounded to bfloat16 are hashed.

    Args:
        model: A model, or a backbone alone.

    Returns:
        SHA-256, in hexadecimal.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(find_backbone(model).named_parameters()):
        if not is_adapter(name):
            value = parameter.detach().to(device='cpu', dtype=torch.bfloat16).contiguous().view(torch.int16)
            digest.update(f'{name} {tuple(value.shape)}\n'.encode())
            digest.update(value.numpy().data)
    return digest.hexdigest()


def _tuned_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors an adapter file holds, by the names they have there."""
    model = unwrap(model)
    backbone = find_backbone(model)
    state = {_BACKBONE + name: value for name, value in backbone.state_dict().items() if is_adapter(name)}
    if backbone is not model:
        state.update((name, value) for name, value in model.state_dict().items() if not name.startswith(_BACKBONE))
    return state


def save_adapter(model: nn.Module, path: str | os.PathLike, metadata: dict[str, Any] | None = None) -> None:
    """Write what was trained to a file: adapters, neck and head.

    The file appears at once and complete, or not at all.

    Args:
        model: An adapted model, or an adapted backbone alone.
        path: Where to write; ``.safetensors`` by custom.
        metadata: Notes of your own to keep with it (JSON).

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
    content = dict(
        format_version=FORMAT_VERSION,
        package_version=__version__,
        method=injection.method.config,
        sites=[attachment.name for attachment in injection.attachments],
        base_fingerprint=fingerprint(model),
        notes=metadata or {},
    )
    save_safetensors(_tuned_state(model), path, metadata={_KEY: json.dumps(content)})


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
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'adapter file {path} does not exist')
    try:
        with safetensors.safe_open(path, framework='pt') as file:
            content = json.loads((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        version = content['format_version']
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(f'{path} is no intact safetensors file: {error}') from error
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(
            f'{path} is a safetensors file, but no adapter file of iconformer_mm: its metadata lacks the key '
            f"'{_KEY}' with a method and a base"
        ) from error
    if version != FORMAT_VERSION:
        raise AdapterFileError(
            f'{path} has format version {version}, this iconformer_mm {__version__} reads version {FORMAT_VERSION}; '
            'install the release that wrote it or a newer one'
        )
    return content, tensors


def load_adapter(model: nn.Module, path: str | os.PathLike, strict: bool = True) -> dict[str, Any]:
    """Load an adapter file into a model.

    An unadapted model is adapted with the file's method first. A backbone
    alone takes the adapters and leaves what the file has for neck and head.
    An error leaves the model as it was.

    Args:
        model: A model with the base weights the adapter was trained on.
        path: The file.
        strict: Whether another base, or tensors that are missing, left over or
            of another shape, are errors. Otherwise what fits is loaded, and
            the rest logged. Defaults to True.

    Returns:
        The file's metadata.

    Raises:
        AdapterFileError: The file cannot be read or does not fit.
        FileNotFoundError: There is no such file.
    """
    content, tensors = read_adapter(path)
    model = unwrap(model)

    problems = []
    actual = fingerprint(model)
    if content['base_fingerprint'] != actual:
        problems.append(
            f'it was trained on another base: the base weights have fingerprint {actual[:12]}, the adapter needs '
            f'{content["base_fingerprint"][:12]}. Load the weights it was trained on first'
        )
        if strict:
            raise AdapterFileError(f'{path} does not fit: {problems[0]}')

    injection = get_injection(model)
    if injection is None:
        inject(model, content['method'])
    elif injection.method.config != content['method']:
        raise AdapterFileError(f'{path} holds {content["method"]}, the model is adapted by {injection.method.config}')

    own = _tuned_state(model)
    if find_backbone(model) is model:
        tensors = {name: value for name, value in tensors.items() if name.startswith(_BACKBONE)}
    fitting = {n: v for n, v in tensors.items() if n in own and own[n].shape == v.shape}
    for what, names in {
        'missing in the file': own.keys() - tensors.keys(),
        'unknown to the model': tensors.keys() - own.keys(),
        'of another shape': (tensors.keys() & own.keys()) - fitting.keys(),
    }.items():
        if names:
            problems.append(f'{len(names)} tensors are {what}, such as {min(names)}')
    if problems and strict:
        if injection is None:
            remove(model)
        raise AdapterFileError(f'{path} does not fit: {"; ".join(problems)}')
    if problems:
        print_log(f'{path} fits in part: {"; ".join(problems)}', logger='current', level=logging.WARNING)

    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    return content
