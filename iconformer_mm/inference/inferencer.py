"""Prediction with one or several adapters on one base, through the inferencers of the OpenMMLab libraries."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.infer import BaseInferencer
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from mmengine.structures import BaseDataElement
from torch import nn

from iconformer_mm.checkpoint import put_adapter, read_adapter
from iconformer_mm.checkpoint.reading import read_checkpoint, state_dict_of
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import build_model, method_of, names_weights
from iconformer_mm.files import expanded
from iconformer_mm.tuning import active_adapter, get_injection, inject, list_adapters, mixed, set_adapter
from iconformer_mm.tuning.accounting import LoadRecord, check_training, require_all
from iconformer_mm.tuning.frozen_precision import check_frozen_dtype
from iconformer_mm.tuning.injection import DEFAULT_NAME, find_backbone
from iconformer_mm.tuning.mixing import check_mixable

AdapterSpec = str | os.PathLike | Mapping[str, Any]


class AdapterInferencer:
    """Predicts on images. All adapters share one base in memory.

    It supports classification, detection, instance segmentation, semantic segmentation and depth. It uses the
    inferencer of the config's library (its ``default_scope``) and the test pipeline of the config.

    Args:
        config: The config of the model: a path, ``library::path``, or a loaded config.
        adapter: An adapter file, or several adapters by name. Each of them is a file, or ``dict(file=..., config=...)``
            with its training config if its neck and head differ from those of ``config``. Defaults to None: the model
            in ``base``, adapted by the config's own PEFTHook if there is one.
        base: Checkpoint with the base weights. Defaults to None: the weights that the config names (``init_cfg``).
        device: Device to run on. Defaults to None: the best one available.
        trust: Whether to unpickle a base (``.pth``) that holds more than tensors and plain data. This can execute code
            in the file. Defaults to False.
        bare: Whether to build the base alone, for a caller that adds adapters to :attr:`model` later. Its neck and head
            may be in no file, so it does not predict before that. Defaults to False.
        frozen_dtype: The precision to hold the base in, see :func:`iconformer_mm.inject`. Defaults to None: the one
            of the config's PEFTHook, if it names one.

    Attributes:
        model: The model.
        classes: Names of the classes of the active adapter, if known.

    Raises:
        AdapterFileError: An adapter file cannot be read or does not fit.
        FileNotFoundError: A file is missing.
        ValueError: The library is unknown, there are no weights, or the base holds more than tensors and plain data
            and is not trusted.
        WeightsError: A part of the model is in none of the files, such as a head for other classes.

    Example:
        >>> inferencer = AdapterInferencer('configs/cifar100/vit-base-p16-mae_icon_8xb128-100e_cifar100.py',
        ...                                adapter='adapter.safetensors', base='mae.pth')
        >>> inferencer(['cat.png'])[0].pred_label
    """

    def __init__(
        self,
        config: str | os.PathLike | Config,
        adapter: AdapterSpec | Mapping[str, AdapterSpec] | None = None,
        base: str | os.PathLike | None = None,
        device: str | None = None,
        trust: bool = False,
        bare: bool = False,
        frozen_dtype: str | None = None,
    ) -> None:
        self._trust, self._bare = trust, bare
        self.cfg = copy.deepcopy(config) if isinstance(config, Config) else load_config(os.fspath(config))
        self.scope = self.cfg.get('default_scope')
        if self.scope not in _INFERENCERS:
            raise ValueError(
                f"the config's default_scope is {self.scope!r}; prediction supports {', '.join(_INFERENCERS)}"
            )
        init_default_scope(self.scope)
        self._frozen_dtype = frozen_dtype or (method_of(self.cfg) or {}).get('frozen_dtype')
        if self._frozen_dtype is not None:
            check_frozen_dtype(self._frozen_dtype)
        specs = _by_name(adapter)
        if bare and specs:
            raise ValueError('a bare base takes no `adapter`: add it later, or leave out `bare`')
        self.model = self._make_model(base, as_config=not specs and not bare)
        self._metas = {name: {**_metainfo(self.cfg), **self._load(name, spec)} for name, spec in specs.items()}
        if not specs and not bare:
            self._require_all()
        self._record.close()
        self._inferencer = _INFERENCERS[self.scope](self.cfg, self.model, device or get_device())
        if specs:
            self.set_adapter(next(iter(specs)))

    def _make_model(self, base: str | os.PathLike | None, as_config: bool) -> BaseModel:
        cfg = self.cfg
        self._files = [base or 'the weights that the config names']
        if base is None and not names_weights(cfg.model):
            raise ValueError(
                'there are no base weights: the config names none (init_cfg of the backbone). Give the checkpoint that '
                'the adapter was trained on as `base`'
            )
        if base is not None and not expanded(base).is_file():
            raise FileNotFoundError(f'the base {base} does not exist')
        model = build_model(cfg)
        method = method_of(cfg)
        if as_config and method is not None:
            inject(model, **{**method, 'frozen_dtype': self._frozen_dtype})
        self._record = LoadRecord(model)
        if getattr(find_backbone(model), 'is_init', False):  # timm initialised it when the model was built
            self._record.note(_names_of_backbone(model))
        if base is None:
            logger = MMLogger.get_current_instance()
            level = logger.level
            logger.setLevel('WARNING')  # otherwise it reports every tensor
            try:
                model.init_weights()
            finally:
                logger.setLevel(level)
        else:
            checkpoint = read_checkpoint(base, self._trust)
            if 'adapter_file' in checkpoint:
                raise ValueError(f'{base} is an adapter file, not a base: give it as `adapter`')
            if as_config:
                check_training(checkpoint, model, get_injection(model), str(base), whole=True)
            load_state_dict(model, state_dict_of(checkpoint, base), strict=False)
        return model

    def _load(self, name: str, spec: AdapterSpec) -> dict:
        """Load an adapter and return what is known about its classes."""
        parts, meta = None, {}
        if isinstance(spec, Mapping):
            unknown = set(spec) - {'file', 'config'}
            if unknown or 'file' not in spec:
                raise ValueError(f"adapter '{name}' must be a file or dict(file=..., config=...), got {dict(spec)}")
            if spec.get('config') is not None:
                own = spec['config']
                own = own if isinstance(own, Config) else load_config(os.fspath(own))
                parts = {n: own.model[n] for n, _ in self.model.named_children() if n in own.model and n != 'backbone'}
                parts.pop('data_preprocessor', None)
                meta = _metainfo(own)
            file = spec['file']
        else:
            file = spec
        # A backbone that is adapted by its type already has an adapter of this name. Load the file into it.
        born = name == DEFAULT_NAME and name in self.adapters
        if born and parts:
            raise ValueError(
                f"adapter '{name}' exists already: the config builds a backbone with an adapter of this name, and it "
                'uses the neck and head of the config. Give the adapter with its own config another name'
            )
        loaded = self._record.loaded()
        content, tensors = read_adapter(file)
        precision = self._frozen_dtype if get_injection(self.model) is None else None
        put_adapter(
            self.model, content, tensors, file, name=None if born else name, parts=parts, frozen_dtype=precision
        )
        set_adapter(self.model, name)
        # The fingerprint verified the base. Copied parts are as complete as their originals.
        own = [n for n in loaded if n.partition('.')[0] not in (parts or {})]
        self._record.note([*_names_of_backbone(self.model), *tensors, *own])
        self._files.append(file)
        self._require_all()
        if content.get('classes'):
            meta = {**meta, 'classes': tuple(content['classes'])}
        return meta

    def _require_all(self) -> None:
        """Refuse a model if a part of it is in none of the files."""
        require_all(self._record, ' and '.join(map(str, self._files)))

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters."""
        return list_adapters(self.model)

    @property
    def classes(self) -> Sequence[str] | None:
        """Names of the classes of the active adapter; None if unknown."""
        return self.meta.get('classes')

    @property
    def meta(self) -> dict:
        """Classes and palette of the active adapter, as far as known."""
        return self.meta_of(None)

    def set_adapter(self, name: str) -> None:
        """Activate an adapter with its neck, head and classes. Nothing is copied.

        Args:
            name: One of :attr:`adapters`.

        Raises:
            ValueError: The adapter does not exist.
        """
        set_adapter(self.model, name)

    def meta_of(self, name: str | None) -> dict:
        """Return the classes and the palette of an adapter, as far as known.

        Args:
            name: One of :attr:`adapters`, or None for the active one, whose head samples without an adapter go through.
        """
        name = active_adapter(self.model) if name is None else name
        return self._metas[name] if name in self._metas else _metainfo(self.cfg)

    def __call__(
        self, images: Any, adapter: str | Sequence[str | None] | None = None, batch_size: int = 1
    ) -> list[BaseDataElement]:
        """Predict on images.

        Args:
            images: One or several paths or images (H, W, 3), uint8, BGR. They are converted to grey for a model of
                grey images.
            adapter: Adapter to activate first. It stays active. A list names the adapter of each image, or None for
                the base with the neck and head of the active adapter; see :func:`iconformer_mm.mixed`. A list
                activates nothing. The images of a batch must then have one size after the test pipeline. Defaults to
                None: the active one.
            batch_size: Number of images per batch. Defaults to 1.

        Returns:
            The library's data samples, one per image.

        Raises:
            ValueError: An adapter does not exist or cannot be mixed, ``adapter`` names more or fewer adapters than
                there are images, images of a mixed batch differ in size, or an image cannot be read.
        """
        self.model.eval()
        if adapter is not None and not isinstance(adapter, str):
            return self._predict_mixed(_listed(images), adapter, batch_size)
        if adapter is not None:
            self.set_adapter(adapter)
        batches = self.batches(images, batch_size)
        return [prediction for batch in batches for prediction in self.forward(batch)]

    def forward(self, batch: dict) -> list[BaseDataElement]:
        """Predict on one of :meth:`batches`, with the adapter that is active.

        Args:
            batch: What :meth:`batches` yields.

        Returns:
            The library's data samples, one per image.

        Raises:
            ValueError: The base is bare, and no adapter was added to it.
        """
        if self._bare and active_adapter(self.model) is None:
            raise ValueError('there is no adapter, and the head of the base is untrained: add an adapter first')
        return self._inferencer.forward(batch)

    def _predict_mixed(
        self, images: list[Any], adapters: Sequence[str | None], batch_size: int
    ) -> list[BaseDataElement]:
        """Predict on images, each with its own adapter."""
        check_mixable(self.model, adapters)
        if len(adapters) != len(images):
            raise ValueError(f'{len(adapters)} adapters were given for {len(images)} images: give one for each image')
        predictions: list[BaseDataElement] = []
        for batch in self.batches(images, batch_size):
            first = len(predictions)
            shapes = [tuple(each.shape) for each in batch['inputs']]
            other = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
            if other is not None:
                raise ValueError(
                    f'images {first} and {first + other} have different sizes after the test pipeline, '
                    f'{shapes[0]} and {shapes[other]}. A batch with several adapters needs images of one size: put '
                    'images of one size into a call, or set batch_size=1'
                )
            with mixed(self.model, adapters[first : first + len(shapes)]):
                predictions += self._inferencer.forward(batch)
        return predictions

    def batches(self, images: Any, batch_size: int = 1) -> Iterator[dict]:
        """Yield batches for the model's ``test_step``: images after the test pipeline of the config.

        Args:
            images: One or several paths or images, as for a prediction.
            batch_size: Number of images per batch. Defaults to 1.

        Raises:
            ValueError: An image cannot be read.
        """
        images = _listed(images)
        if _num_channels(self.model) == 1:
            images = [_to_grey(image) for image in images]
        for batch in self._inferencer.preprocess(images, batch_size=batch_size):
            # MMDetection's inferencer returns the images and the batch.
            yield batch if isinstance(batch, dict) else batch[1]


def _listed(images: Any) -> list[Any]:
    """Return one or several images or paths as a list."""
    if isinstance(images, (str, os.PathLike)) or not isinstance(images, Sequence):
        images = [images]
    return [os.fspath(image) if isinstance(image, os.PathLike) else image for image in images]


def _names_of_backbone(model: nn.Module) -> list[str]:
    """Return the names of the tensors of a model's backbone."""
    prefixes = [name for name, module in model.named_modules() if module is find_backbone(model)]
    return [f'{prefixes[0]}.{name}'.removeprefix('.') for name in find_backbone(model).state_dict()]


def _by_name(adapter: AdapterSpec | Mapping[str, AdapterSpec] | None) -> dict[str, AdapterSpec]:
    """Return adapters by name. A single adapter gets the default name."""
    if adapter is None:
        return {}
    if isinstance(adapter, Mapping) and 'file' not in adapter:
        if not adapter:
            raise ValueError('`adapter` is an empty dictionary; give at least one adapter, or None')
        return dict(adapter)
    return {DEFAULT_NAME: adapter}


def _metainfo(cfg: Config) -> dict:
    """Return the classes and the palette of the config's test data without reading the data."""
    dataset = (cfg.get('test_dataloader') or cfg.get('val_dataloader') or {}).get('dataset') or {}
    kind = dataset.get('type')
    if isinstance(kind, str):
        kind = DATASETS.get(kind if '.' in kind else f'{cfg.default_scope}.{kind}')
    known = getattr(kind, 'METAINFO', {})
    meta = {**known, **(dataset.get('metainfo') or {})}
    return {key: meta[key] for key in ('classes', 'palette') if meta.get(key) is not None}


def _num_channels(model: nn.Module) -> int | None:
    """Return the number of image channels of a model, from the means that its preprocessor subtracts."""
    mean = getattr(getattr(model, 'data_preprocessor', None), 'mean', None)
    return None if mean is None else len(mean)


def _to_grey(image: str | np.ndarray) -> np.ndarray:
    """An image (H, W) of a file or of an image (H, W, 3), BGR."""
    import mmcv

    if isinstance(image, str):
        grey = mmcv.imread(image, 'grayscale')
        if grey is None:
            raise ValueError(f'Failed to read image {image}.')
        return grey
    return mmcv.bgr2gray(image) if image.ndim == 3 and image.shape[2] == 3 else image


class _Inferencer(BaseInferencer):
    """Makes a library's inferencer use an existing model. Only its test pipeline and forward pass are needed."""

    def __init__(self, cfg: Config, model: BaseModel, device: str) -> None:
        self.cfg, self.given = cfg, model
        super().__init__(copy.deepcopy(cfg), device=device)
        self.show_progress = False  # not an argument in mmseg 1.2

    def _init_model(self, cfg: Any, weights: Any, device: str = 'cpu') -> BaseModel:
        self.given.cfg = cfg
        self.given.dataset_meta = _metainfo(cfg)
        return self.given.to(device).eval()


def _detection(cfg: Config, model: BaseModel, device: str) -> BaseInferencer:
    from mmdet.apis import DetInferencer

    return type('Detection', (_Inferencer, DetInferencer), {})(cfg, model, device)


def _segmentation(cfg: Config, model: BaseModel, device: str) -> BaseInferencer:
    from mmseg.apis import MMSegInferencer

    return type('Segmentation', (_Inferencer, MMSegInferencer), {})(cfg, model, device)


def _classification(cfg: Config, model: BaseModel, device: str) -> Any:
    from mmpretrain.apis import ImageClassificationInferencer

    model._config, model._dataset_meta = copy.deepcopy(cfg), _metainfo(cfg)
    return ImageClassificationInferencer(model, pretrained=False, device=device)


_INFERENCERS = {'mmpretrain': _classification, 'mmdet': _detection, 'mmseg': _segmentation}
