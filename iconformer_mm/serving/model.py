"""One base in memory, and the adapters that are in use."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from iconformer_mm.checkpoint import AdapterFileError, base_difference, base_of, put_adapter
from iconformer_mm.checkpoint.reading import guard_loading
from iconformer_mm.engine.config import build_model
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.messages import one_line
from iconformer_mm.tuning import active_adapter, delete_adapter, get_injection, mixed, set_adapter
from iconformer_mm.tuning.mixing import check_mixable
from iconformer_mm.tuning.selection import Selection
from iconformer_mm.tuning.switching import add_selected

from .errors import RequestError
from .folder import AdapterEntry, AdapterFolder, read_version
from .settings import Settings

_BASE = '.base'  # no file has this name
_TRIES = 5


@dataclass(frozen=True)
class Job:
    """An image that waits for its prediction.

    Attributes:
        adapter: Name of the adapter.
        batch: The image after the test pipeline, as a batch of one.
    """

    adapter: str
    batch: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """What images of one batch have in common: channels, height and width."""
        inputs = self.batch['inputs']
        return tuple(inputs.shape[1:] if isinstance(inputs, Tensor) else inputs[0].shape)


@dataclass(frozen=True)
class Prediction:
    """What the model says about an image.

    Attributes:
        sample: The library's data sample, on the CPU.
        version: Version of the adapter.
        meta: ``classes`` and ``palette``, if known.
    """

    sample: BaseDataElement
    version: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class _Loaded:
    key: str  # its name in the model
    version: str
    meta: dict[str, Any]
    mixable: bool  # whether its method allows other adapters in the same batch


class ServedModel:
    """A base and its adapters. Adapters are loaded when they are needed, and the least recently used ones leave.

    :meth:`prepare` may be called from any thread. :meth:`predict` is for one thread at a time.

    Args:
        settings: The settings.

    Raises:
        ValueError: See :class:`iconformer_mm.inference.AdapterInferencer`.
        FileNotFoundError: The config or the base does not exist.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        guard_loading(settings.trust, 'start the server with --trust-checkpoints')
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._inferencer = AdapterInferencer(
            settings.config, base=settings.base, device=settings.device, trust=settings.trust, bare=True
        )
        self._model = self._inferencer.model
        self._meta = self._inferencer.meta
        self._templates = {self._num_classes(): self._parts(self._model)}
        if get_injection(self._model) is None:
            # So that no adapter is the first. The first may train the base in place, which others share.
            add_selected(self._model, _BASE, 'frozen', None, Selection())
        self._base = base_of(self._model)
        self._differences: dict[Any, str | None] = {}
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self.folder = AdapterFolder(settings.adapters, self.unfit)
        self.num_loads = 0

    @property
    def scope(self) -> str:
        """The library of the config."""
        return self._inferencer.scope

    @property
    def loaded(self) -> list[str]:
        """Names of the adapters in memory, the least recently used first."""
        return list(self._loaded)

    def unfit(self, content: dict[str, Any]) -> str | None:
        """Say why an adapter file does not fit the base, by its metadata; None if it seems to fit."""
        keys = ('base_fingerprint', 'base_buffers_fingerprint')
        lists = ('base_parameters', 'base_buffers')
        key = (*(content.get(k) for k in keys), *(tuple(content.get(k) or ()) for k in lists))
        with self._lock:
            if key not in self._differences:
                self._differences[key] = base_difference(content, self._base)
            difference = self._differences[key]
        if difference is not None:
            return f'it was trained on another base: {difference}'
        return None

    def prepare(self, image: np.ndarray) -> dict[str, Any]:
        """Run the test pipeline of the config on an image.

        Args:
            image: (H, W, 3), uint8, BGR.

        Returns:
            A batch of one.

        Raises:
            RequestError: The pipeline cannot take the image.
        """
        try:
            (batch,) = self._inferencer.batches([image])
        except Exception as error:  # of any library
            raise _not_taken(image.shape[:2], error) from error
        return batch

    def predict(self, jobs: Sequence[Job]) -> list[Prediction | Exception]:
        """Predict on images of any adapters.

        Images of the same shape after the pipeline are run together, so an answer does not depend on the others in the
        batch: libraries pad images of different shapes.

        Args:
            jobs: The images.

        Returns:
            One prediction or exception per image.
        """
        results: dict[int, Prediction | Exception] = {}
        adapters = self._load_all([job.adapter for job in jobs])
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, job in enumerate(jobs):
            found = adapters[job.adapter]
            if isinstance(found, Exception):
                results[index] = found
            else:
                groups.setdefault(job.shape, []).append(index)
        for indices in groups.values():
            loaded = [adapters[jobs[index].adapter] for index in indices]
            batches = [jobs[index].batch for index in indices]
            results.update(zip(indices, self._run(batches, loaded)))  # type: ignore[arg-type]
        return [results[index] for index in range(len(jobs))]

    def _run(self, batches: list[dict], adapters: list[_Loaded]) -> list[Prediction | Exception]:
        """Run images of one shape. If the batch fails, its images are run one by one."""
        try:
            samples = self._forward(batches, adapters)
        except Exception as error:  # of any library
            if len(batches) > 1:
                return [self._run([batch], [adapter])[0] for batch, adapter in zip(batches, adapters)]
            return [_not_taken(batches[0]['data_samples'][0].metainfo.get('ori_shape'), error)]
        return [Prediction(s.cpu(), a.version, a.meta) for s, a in zip(samples, adapters)]

    def _forward(self, batches: Sequence[dict], adapters: Sequence[_Loaded]) -> list[Any]:
        """Run images of one shape.

        Adapters whose methods allow it share one batch. The others have batches of their own.

        Returns:
            One data sample per image.
        """
        groups: dict[str | None, list[int]] = {}
        for index, adapter in enumerate(adapters):
            groups.setdefault(None if adapter.mixable else adapter.key, []).append(index)
        samples: list[Any] = [None] * len(batches)
        for indices in groups.values():
            names = [adapters[index].key for index in indices]
            batch = join([batches[index] for index in indices])
            if len(set(names)) == 1:
                self._inferencer.set_adapter(names[0])
                found = self._inferencer.forward(batch)
            else:
                with mixed(self._model, names):
                    found = self._inferencer.forward(batch)
            for index, sample in zip(indices, found):
                samples[index] = sample
        return samples

    def _load_all(self, names: Iterable[str]) -> dict[str, _Loaded | Exception]:
        """Have these adapters in memory, in their current versions."""
        found: dict[str, _Loaded | Exception] = {}
        for name in dict.fromkeys(names):
            try:
                found[name] = self._ensure(name)
            except Exception as error:
                found[name] = error
        served = {entry.name for entry in self.folder.entries if entry.refused is None}
        for name in [name for name in self._loaded if name not in found]:
            if name not in served or len(self._loaded) > self._settings.max_adapters:
                self._unload(name)
        return found

    def _ensure(self, name: str) -> _Loaded:
        """Have an adapter in memory in its current version.

        Raises:
            RequestError: There is none, or it does not fit.
        """
        for _ in range(_TRIES):
            try:
                entry = self.folder.get(name)
            except RequestError:
                self._unload(name)
                raise
            known = self._loaded.get(name)
            if known is not None and known.version == entry.version:
                self._loaded.move_to_end(name)
                return known
            self._unload(name)
            try:
                loaded = self._load(entry)
            except FileNotFoundError:
                self.folder.scan()
                continue
            except (AdapterFileError, OSError, ValueError) as error:
                self.folder.refuse(entry, error)
                continue  # the folder says why it is refused, or has a newer version
            if loaded.version == entry.version:
                self._loaded[name] = loaded
                self.num_loads += 1
                return loaded
            self._delete(loaded)
            self.folder.scan()
        raise RequestError(409, 'adapter_refused', f"adapter '{name}' changes all the time")

    def _load(self, entry: AdapterEntry) -> _Loaded:
        """Load an adapter file into the model.

        Raises:
            AdapterFileError: It does not fit.
        """
        version, content, tensors = read_version(entry.path)
        classes = content.get('classes')
        parts = self._parts_for(len(classes) if classes else None)
        outside = tuple(f'{part}.' for part, module in parts.items() if module.state_dict())
        if outside and not any(tensor.startswith(outside) for tensor in tensors):
            raise AdapterFileError(f'{entry.path} holds no neck or head, so its predictions would be random')
        key = f'{entry.name}@{version}'
        own: dict[str, nn.Module | dict] = {name: copy.deepcopy(part) for name, part in parts.items()}
        put_adapter(self._model, content, tensors, entry.path, name=key, parts=own)
        self._model.eval()
        meta = {**self._meta, 'classes': tuple(classes)} if classes else dict(self._meta)
        palette = meta.get('palette')
        if palette is not None and len(palette) < len(meta.get('classes') or ()):
            del meta['palette']
        try:
            check_mixable(self._model, [key])
        except ValueError:
            return _Loaded(key, version, meta, mixable=False)
        return _Loaded(key, version, meta, mixable=True)

    def _unload(self, name: str) -> None:
        loaded = self._loaded.pop(name, None)
        if loaded is not None:
            self._delete(loaded)

    def _delete(self, loaded: _Loaded) -> None:
        if active_adapter(self._model) == loaded.key:
            set_adapter(self._model, next(iter(self._inferencer.adapters)))
        delete_adapter(self._model, loaded.key)

    def _num_classes(self) -> int | None:
        classes = self._meta.get('classes')
        return len(classes) if classes else None

    @staticmethod
    def _parts(model: nn.Module) -> dict[str, nn.Module]:
        """Copy the neck and head of a model."""
        return {
            name: copy.deepcopy(module)
            for name, module in model.named_children()
            if name not in ('backbone', 'data_preprocessor')
        }

    def _parts_for(self, num_classes: int | None) -> dict[str, nn.Module]:
        """Return neck and head for a number of classes, not yet filled with an adapter's tensors.

        They are those of the config. If the number differs from the config's, it replaces every ``num_classes`` that
        is the config's number.
        """
        own = self._num_classes()
        if num_classes is None or own is None:
            num_classes = own
        if num_classes not in self._templates:
            cfg = copy.deepcopy(self._inferencer.cfg)
            init_default_scope(cfg.default_scope)
            for name, part in cfg.model.items():
                if name != 'backbone':
                    _replace_num_classes(part, own, num_classes)
            self._templates[num_classes] = self._parts(build_model(cfg))
        return self._templates[num_classes]


def join(batches: Sequence[dict]) -> dict[str, Any]:
    """Make one batch of several of the same shape."""
    inputs = [batch['inputs'] for batch in batches]
    return dict(
        inputs=torch.cat(inputs) if isinstance(inputs[0], Tensor) else [image for each in inputs for image in each],
        data_samples=[sample for batch in batches for sample in batch['data_samples']],
    )


def _replace_num_classes(node: Any, old: int | None, new: int | None) -> None:
    if isinstance(node, (dict, Config)):
        if node.get('num_classes') == old and old is not None:
            node['num_classes'] = new
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            _replace_num_classes(child, old, new)


def _not_taken(shape: Any, error: Exception) -> RequestError:
    size = f' ({shape[0]} x {shape[1]})' if shape else ''
    message = f'the image{size} cannot be taken by the model ({type(error).__name__}: {one_line(error)[:300]})'
    return RequestError(422, 'image_not_taken', message)
