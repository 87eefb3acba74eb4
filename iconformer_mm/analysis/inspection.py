"""What a config would train and at what cost, before any training. It also finds common mistakes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, DefaultScope, init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iconformer_mm.checkpoint.adapter_file import is_adapter_file
from iconformer_mm.checkpoint.safetensors_io import read_metadata
from iconformer_mm.datasets.checks import DataError, check_dataset, describe
from iconformer_mm.datasets.fit import (
    class_fault,
    find_class_list_fault,
    find_faults,
    is_depth,
    look_at_model,
    other_classes,
)
from iconformer_mm.engine.config import build_model, method_of, names_weights, peft_hooks
from iconformer_mm.registry import accepted, is_type, type_name
from iconformer_mm.tuning import Summary, get_injection, inject, summarize
from iconformer_mm.tuning.accounting import NO_WEIGHTS
from iconformer_mm.tuning.backbones import search, unwrap
from iconformer_mm.tuning.injection import backbones_of
from iconformer_mm.tuning.prefix import FrozenPrefix, PrefixError, Replay
from iconformer_mm.tuning.sites import find_sites
from iconformer_mm.tuning.unused import unused_adapters

MIB = 2**20


def _gives_base(path: Any) -> bool:
    """Whether ``load_from`` may hold base weights. Any file may, except an adapter file."""
    if not path:
        return False
    if str(path).endswith('.safetensors') and Path(path).is_file():
        return not is_adapter_file(read_metadata(path))
    return True


def parts_of_model(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the config of a model and every config nested in it, wherever its backbones are."""
    if isinstance(node, Mapping):
        yield node  # type: ignore[misc]
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from parts_of_model(child)


def _born_adapted(cfg: Config) -> list[dict[str, Any]]:
    return [part for part in parts_of_model(cfg.model) if type_name(part).startswith('ICoN')]


def find_mistakes(cfg: Config, data: bool = True) -> list[str]:
    """Find probable mistakes in a config for parameter-efficient fine-tuning.

    Args:
        cfg: The config.
        data: Whether to also check that model and data fit. If the data exists, some labels are read; see
            :mod:`iconformer_mm.datasets.fit`. Nothing is downloaded. Defaults to True.

    Returns:
        One sentence per finding: what is wrong and what to do.
    """
    return _tuning_mistakes(cfg) + (list(_data_mistakes(cfg)) if data else [])


def _tuning_mistakes(cfg: Config) -> list[str]:
    method = method_of(cfg)
    if method is None and not _born_adapted(cfg):
        return []  # stock fine-tuning
    entries = (method or {}).get('methods') or [(method or {}).get('method') or 'icon']
    names = [entry if isinstance(entry, str) else type_name(entry) for entry in entries]
    if 'full' in names:
        return []
    found = []
    if not names_weights(cfg.model) and not _gives_base(cfg.get('load_from')) and not cfg.get('resume'):
        found.append(NO_WEIGHTS)
    stages = [part['frozen_stages'] for part in parts_of_model(cfg.model) if part.get('frozen_stages', -1) >= 0]
    if stages:
        found.append(
            f'frozen_stages={stages[0]} has no effect: every stage of the backbone is frozen, except what `unfreeze` '
            'names, and adapters are trained in every block that `blocks` selects'
        )
    wrapper = cfg.get('model_wrapper_cfg') or {}
    if cfg.get('find_unused_parameters') or wrapper.get('find_unused_parameters'):
        found.append(
            'find_unused_parameters costs time, and frozen parameters do not need it: distributed training does not '
            'wait for them'
        )
    wrapper = cfg.get('optim_wrapper') or {}
    optimizer = wrapper.get('optimizer') or {}
    rate = optimizer.get('lr')
    if rate is not None:
        rate *= (wrapper.get('paramwise_cfg') or {}).get('adapter_lr_mult', 1)
    if type_name(optimizer).startswith('Adam') and rate is not None and rate < 3e-5 and set(names) != {'frozen'}:
        found.append(
            f'lr={rate:g} is a rate for full fine-tuning; adapters start from zero and need a higher one, 1e-3 to '
            f'1e-2 with {type_name(optimizer)}'
        )
    return found


LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def _data_mistakes(cfg: Config) -> Iterator[str]:
    """Yield every mismatch between the model and the data sets of a config."""
    if cfg.get('default_scope'):
        init_default_scope(cfg.default_scope)
    model = look_at_model(cfg.model)
    trained_on, trained_classes, found = None, None, set()
    for name in LOADERS:
        dataset = (cfg.get(name) or {}).get('dataset')
        if not isinstance(dataset, Mapping):
            continue
        training = name == LOADERS[0]
        fault = find_class_list_fault(dataset)
        parts = list(_parts_of(dataset))
        faults: list[str] = []
        if fault:
            faults = [fault]
        elif all(map(_is_there, parts)):
            try:
                built = DATASETS.build(_without_download(dataset))
                check_dataset(built)
                metrics = () if training else _metrics_of(cfg.get(name.replace('dataloader', 'evaluator')))
                faults = list(find_faults(model, built, metrics, training, trained_on))
                trained_on = built if training else trained_on
            except DataError as error:
                faults = [str(error)]
            except Exception as error:  # libraries raise various exceptions
                faults = [f'{describe(dataset)} cannot be loaded: {type(error).__name__}: {error}']
        else:
            for part in parts:
                known = _metainfo_of(part)
                classes = known.get('classes')
                if is_depth(part):
                    continue
                fault = class_fault(model, part, known)
                if fault:
                    faults.append(fault)
                if training:
                    trained_classes = trained_classes or classes
                elif model.heads and trained_classes and classes and tuple(classes) != tuple(trained_classes):
                    faults.append(other_classes(part, classes, trained_classes))
        yield from (fault for fault in faults if fault not in found)
        found.update(faults)


def unseen_data(cfg: Config) -> list[str]:
    """Describe the data sets of a config that :func:`find_mistakes` cannot check because they do not exist."""
    datasets = [(cfg.get(name) or {}).get('dataset') for name in LOADERS]
    parts = [part for dataset in datasets if isinstance(dataset, Mapping) for part in _parts_of(dataset)]
    return list(dict.fromkeys(describe(part) for part in parts if not _is_there(part)))


def _parts_of(dataset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the data sets inside the wrappers of a config."""
    inner = dataset.get('dataset', dataset.get('datasets'))
    if inner is None:
        yield dataset
        return
    for part in inner if isinstance(inner, (list, tuple)) else [inner]:
        yield from _parts_of(part)


def _is_there(part: Mapping[str, Any]) -> bool:
    """Whether a data set can be built: its folder or files exist, or it needs none."""
    root = part.get('data_root')
    if root:
        return Path(root).exists()
    prefix = part.get('data_prefix') or ()
    places = [part.get('ann_file'), *(prefix.values() if isinstance(prefix, Mapping) else [prefix])]
    return all(Path(place).exists() for place in places if place and isinstance(place, str))


def _without_download(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a data set's config and switch off downloads in the copy."""
    copied = copy.deepcopy(dataset)
    for part in _parts_of(copied):
        kind = _class_of(part)
        if kind is not None and 'download' in accepted(kind):
            part['download'] = False  # type: ignore[index]
    return copied  # type: ignore[return-value]


def _class_of(part: Mapping[str, Any]) -> type | None:
    kind = part.get('type')
    if not isinstance(kind, str):
        return kind
    scope = DefaultScope.get_current_instance()
    return DATASETS.get(kind if '.' in kind or scope is None else f'{scope.scope_name}.{kind}')


def _metainfo_of(part: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a data set that is known without building it."""
    known = dict(getattr(_class_of(part), 'METAINFO', None) or {})
    known.update(part.get('metainfo') or {})
    if part.get('classes') is not None:
        known['classes'] = part['classes']
    return known


def _metrics_of(evaluator: Any) -> list[Any]:
    """Build the metrics of a config that constrain the data. Others are not built: they may need files."""
    metrics = evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]
    return [METRICS.build(metric) for metric in metrics if metric and is_type(metric, 'DepthMetric', 'Accuracy')]


@dataclass(frozen=True)
class Cost:
    """The cost of a training step with one image.

    Attributes:
        gflop: Billions of floating-point operations of the forward pass of the image encoders.
        stored_mib: MiB that the forward pass of the image encoders stores for the backward pass, without parameters.
        gradient_mib: MiB of the gradients in the whole model. Data-parallel training exchanges the same amount per
            step.
        optimizer_mib: MiB of AdamW's two states per trained parameter.
        checkpoint_mib: MiB of the trained parameters.
    """

    gflop: float
    stored_mib: float
    gradient_mib: float
    optimizer_mib: float
    checkpoint_mib: float


def image_encoders(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that can be run on images alone, by path.

    Args:
        model: A model, adapted or not.
    """
    adapted, found = backbones_of(model), search(unwrap(model)).learning
    return {p: m for p, m in adapted.items() if p in found or find_sites(m)} or found or adapted


def cost_of(model: nn.Module, shape: tuple[int, int]) -> Cost:
    """Measure a model's backbones on one image, and count the memory that its training needs.

    Args:
        model: A model, adapted or not.
        shape: Height and width of the image in pixels.
    """
    backbones = list(image_encoders(model).values())
    parameters = {p.untyped_storage().data_ptr() for backbone in backbones for p in backbone.parameters()}
    stored: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outs = []  # kept alive, so that no address is reused
        for backbone in backbones:
            channels = next((m.in_channels for m in backbone.modules() if isinstance(m, nn.Conv2d)), 3)
            outs.append(backbone(torch.zeros(1, channels, *shape)))
    del outs
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad) / MIB
    return Cost(counter.get_total_flops() / 1e9, sum(stored.values()) / MIB, trained, 2 * trained, trained)


@dataclass(frozen=True)
class PrefixSaving:
    """What computing the frozen prefix once would save, see :mod:`iconformer_mm.engine.prefix_cache`.

    Attributes:
        blocks: Number of frozen blocks before the first trained module, which a step would not run.
        all_blocks: Number of blocks of the backbone.
        gflop: Billions of floating-point operations of the backbone's forward pass that are left.
        mib: MiB of an image and view, as computed. ``dtype='bfloat16'`` takes half of it.
    """

    blocks: int
    all_blocks: int
    gflop: float
    mib: float


def prefix_saving(model: nn.Module, shape: tuple[int, int]) -> PrefixSaving:
    """Find the frozen prefix of an adapted model, and what computing it once would save.

    Args:
        model: The model.
        shape: Height and width of the images in pixels.

    Raises:
        PrefixError: It has none, or none that can be computed once.
    """
    injection = get_injection(model)
    if injection is None:
        raise PrefixError('prefix_cache: the model is not adapted')
    prefix = FrozenPrefix(injection)
    channels = next((m.in_channels for m in prefix.backbone.modules() if isinstance(m, nn.Conv2d)), 3)
    images = torch.rand(2, channels, *shape, generator=torch.Generator().manual_seed(0))
    blank = torch.zeros_like(images)
    with prefix.installed(), torch.no_grad():
        plan = prefix.plan(*(((x,), {}) for x in (images, images.flip(0), blank)))
        (records,) = prefix.record(plan, lambda: prefix.backbone(images), stop=False)
        with FlopCounterMode(display=False) as counter, Replay(prefix, plan, [records]):
            prefix.backbone(blank)
    mib = sum(value.nbytes for value in records.values()) / 2 / MIB
    return PrefixSaving(len(plan.blocks), len(prefix.sites), counter.get_total_flops() / 2e9, mib)


@dataclass(frozen=True)
class Inspection:
    """What a config would train.

    Attributes:
        summary: Counts of parameters.
        sites: Name and kind of each adapted module, and its number of added parameters.
        cost: The cost of the config.
        full: The cost of full fine-tuning.
        mistakes: Findings of :func:`find_mistakes`, and adapters whose output is unused.
        unseen: Data sets that do not exist and were not checked.
        prefix: What computing the frozen prefix once would save; None if there is no such prefix.
    """

    summary: Summary
    sites: list[tuple[str, str, int]]
    cost: Cost
    full: Cost
    mistakes: list[str]
    unseen: list[str]
    prefix: PrefixSaving | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the inspection as plain data."""
        return asdict(self)


def inspect_model(cfg: Config, shape: tuple[int, int] = (224, 224)) -> Inspection:
    """Inspect what a config would train, without weights or training.

    Args:
        cfg: The config, with a PEFTHook or a backbone that is adapted by its type (``ICoN...``).
        shape: Height and width of the images in pixels. Defaults to 224 x 224.

    Raises:
        ValueError: The method cannot be applied to the model.
    """
    model = build_model(cfg)
    method = method_of(cfg)
    if get_injection(model) is None:
        full = cost_of(model, shape)
        inject(model, **(dict(method='full') if method is None else method))
    else:
        plain = copy.deepcopy(cfg)
        for part in _born_adapted(plain):
            part['peft'] = dict(type='full')
        full = cost_of(build_model(plain), shape)
    injection = get_injection(model)
    sites = [
        (name, a.kind, sum(p.numel() for adapter in a.adapters.values() for p in adapter.parameters()))
        for name, a in (injection.named_attachments().items() if injection else ())
    ]
    unused = unused_adapters(model)
    mistakes = find_mistakes(cfg) + ([] if unused is None else [unused])
    prefix = None
    try:
        prefix = prefix_saving(model, shape)
    except PrefixError as error:
        if any(hook.get('prefix_cache') for hook in peft_hooks(cfg) if isinstance(hook, Mapping)):
            mistakes.append(str(error))
    return Inspection(summarize(model), sites, cost_of(model, shape), full, mistakes, unseen_data(cfg), prefix)
