"""Filling caches before a training, and reading them in its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.runner import Runner
from mmengine.runner.amp import autocast
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from iconformer_mm.checkpoint.safetensors_io import DamagedFileError
from iconformer_mm.registry import is_type
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.injection import unwrap
from iconformer_mm.tuning.prefix import FrozenPrefix, PrefixError, PrefixPlan, Replay, Values

from ..hooks.adapter_checkpoint_hook import on_main_process, random_state, set_random_state
from .draws import INPUTS, RECORDS, CachedDataset, Draws, draw, pack, random_numbers, seeded, stack, unpack
from .keys import describe_data, describe_prefix, describe_preprocessor, digest_of
from .options import DTYPES, PrefixCacheOptions
from .records import encode
from .shards import FORMAT, Shards, check_space, filling, size_of

SHARD = 1 << 27  # bytes of a shard, about
# Hooks that change the data set while it is trained on.
_SWITCHES = ('SwitchRecipeHook', 'PipelineSwitchHook', 'YOLOXModeSwitchHook')
# How far a stored tensor may be from the same one computed anew, as a share of its largest value.
_ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
_ANOTHER_MACHINE = 2e-3


@dataclass
class _Source:
    """Data to cache.

    Attributes:
        name: ``'training'`` or ``'validation'``.
        loader: Its data loader.
        config: The config of its data set, None if the user built it.
        context: Makes the context that the model runs in.
        views: Draws of each image.
        fixed: Whether the pipeline may draw nothing at random.
    """

    name: str
    loader: DataLoader
    config: Any
    context: Callable[[], AbstractContextManager]
    views: int
    fixed: bool

    @property
    def training(self) -> bool:
        """Whether the model is trained on it."""
        return self.name == 'training'

    @property
    def batch_size(self) -> int:
        """Images in a batch."""
        return self.loader.batch_size or getattr(self.loader.batch_sampler, 'batch_size', None) or 1


class PrefixCache:
    """The caches of a training: one of the training data, one of the validation data.

    Before the training they are filled, or found complete. In the training, the data loaders read from them. Each
    step then begins at the first adapted block.

    Args:
        options: What the user asked for.
    """

    def __init__(self, options: PrefixCacheOptions) -> None:
        self.options = options
        self._prefix: FrozenPrefix | None = None
        self._plan: PrefixPlan | None = None
        self._replay: Replay | None = None
        self._original: list[tuple[Any, DataLoader]] = []

    # Before and after the training

    def begin(self, runner: Runner) -> None:
        """Fill the caches, or find them, and have the loops read from them. Random states stay as they are.

        Args:
            runner: The runner, with its weights loaded.

        Raises:
            PrefixError: The model or its data cannot be cached, or the disk has no room.
            DamagedFileError: A file of a cache is truncated, altered or of another cache.
        """
        model = unwrap(runner.model)
        injection = get_injection(model)
        assert injection is not None
        prefix = FrozenPrefix(injection)
        sources = self._sources(runner)
        _check_runner(runner, model, sources)
        state, modes = random_state(), [(module, module.training) for module in model.modules()]
        prefix.install()
        try:
            filler = _Filler(runner, model, prefix, self.options)
            filler.find_plan(sources[0])
            all_shards = filler.prepare(sources)
        except BaseException:
            prefix.remove()
            raise
        finally:
            for module, mode in modes:
                module.training = mode
            set_random_state(state)
        self._prefix, self._plan = prefix, filler.plan
        loops = [runner.train_loop, runner.val_loop]
        for loop, source, shards in zip(loops, sources, all_shards):
            self._original.append((loop, source.loader))
            _set_loader(loop, _reading(source.loader, CachedDataset(source.loader.dataset, shards, source.views)))
        set_random_state(state)  # a loop may have begun its new loader

    def _sources(self, runner: Runner) -> list[_Source]:
        def config_of(name: str) -> Any:
            loader = runner.cfg.get(name)
            return loader.get('dataset') if isinstance(loader, Mapping) else None

        wrapper: Any = runner.optim_wrapper
        views = self.options.views
        sources = [
            _Source(
                'training',
                runner.train_loop.dataloader,
                config_of('train_dataloader'),
                lambda: wrapper.optim_context(runner.model),
                views or 1,
                views is None,
            )
        ]
        loop: Any = runner.val_loop
        if self.options.validation and getattr(loop, 'dataloader', None) is not None:
            enabled = bool(getattr(loop, 'fp16', False))
            config = config_of('val_dataloader')
            sources.append(_Source('validation', loop.dataloader, config, lambda: autocast(enabled=enabled), 1, True))
        return sources

    def end(self) -> None:
        """Give the loops their own data loaders back."""
        for loop, loader in self._original:
            loop.dataloader = loader
        self._original.clear()
        if self._prefix is not None:
            self._prefix.remove()
        self._prefix = self._plan = self._replay = None

    # In a step

    def enter(self, batch: Any) -> None:
        """Take what was recorded out of a batch, for the step that follows in this thread.

        Args:
            batch: What the data loader gave.

        Raises:
            PrefixError: The loader's collate function dropped what was recorded.
        """
        if self._prefix is None or self._plan is None:
            return
        if not isinstance(batch, dict) or RECORDS not in batch:
            raise PrefixError(
                'prefix_cache: the batch has lost what was recorded of its images. The collate function must keep '
                'every key of the samples, as pseudo_collate and default_collate do'
            )
        self._replay = Replay(self._prefix, self._plan, stack(batch.pop(RECORDS)))
        self._replay.begin()

    def leave(self) -> None:
        """End the step."""
        replay, self._replay = self._replay, None
        if replay is not None:
            replay.end()

    def reads(self, loop: Any) -> bool:
        """Whether a loop reads from a cache."""
        return any(loop is other for other, _ in self._original)


def _check_runner(runner: Runner, model: nn.Module, sources: Sequence[_Source]) -> None:
    """Refuse what a cache cannot follow.

    Raises:
        PrefixError: Something changes images or data after the pipeline.
    """
    if runner.cfg.get('compile'):
        raise PrefixError('prefix_cache does not work with a compiled model; leave `compile` out of the config')
    for hook in runner.hooks:
        if is_type(hook, *_SWITCHES):
            raise PrefixError(
                f'prefix_cache: {type(hook).__name__} changes the data set in training, which drawn samples do not '
                'follow. Remove the hook, or train without prefix_cache'
            )
    if getattr(getattr(model, 'data_preprocessor', None), 'batch_augments', None):
        raise PrefixError(
            'prefix_cache: the data preprocessor mixes or resizes the images of a batch at random (batch_augments), '
            'so an image has no prefix of its own. Remove batch_augments, or train without prefix_cache'
        )
    for source in sources:
        if isinstance(source.loader.dataset, IterableDataset):
            raise PrefixError(f'prefix_cache needs {source.name} data with an index; IterableDataset has none')


def _reading(loader: DataLoader, dataset: CachedDataset) -> DataLoader:
    """A data loader like another one, with the same sampler, that reads another data set."""
    copied = copy.copy(loader)
    vars(copied).update(dataset=dataset, _iterator=None)  # DataLoader refuses to set it
    return copied


def _set_loader(loop: Any, loader: DataLoader) -> None:
    loop.dataloader = loader
    if hasattr(loop, 'dataloader_iterator'):
        loop.dataloader_iterator = type(loop.dataloader_iterator)(loader)


class _Filler:
    """Finds the plan, and fills the caches."""

    plan: PrefixPlan

    def __init__(self, runner: Runner, model: Any, prefix: FrozenPrefix, options: PrefixCacheOptions) -> None:
        self.logger = runner.logger
        self.model = model
        self.prefix = prefix
        self.options = options
        self.dtype = DTYPES[options.dtype]

    def find_plan(self, source: _Source) -> None:
        """Find out what to record, on the first two images."""
        items = self._first_items(source)
        blank = [{**item, INPUTS: torch.zeros_like(item[INPUTS])} for item in items]
        with source.context():
            self.model.train()
            given = [self.prefix.arguments(self._forward(source, batch)) for batch in (items, items[::-1], blank)]
            self.plan = self.prefix.plan(*given)
            self._check_losses(source, items, blank)

    @torch.no_grad()
    def _check_losses(self, source: _Source, items: Sequence[dict[str, Any]], blank: Sequence[dict[str, Any]]) -> None:
        """Compare the losses of a step with those of a step from records, which sees blank images.

        Raises:
            PrefixError: They differ, so something beside the backbone reads the images.
        """
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        with seeded(0):
            expected = self._forward(source, items)()
        records = self.prefix.record(self.plan, self._forward(source, items))
        with seeded(0), Replay(self.prefix, self.plan, records):
            found = self._forward(source, blank)()
        for name, value in self.model.named_buffers():  # statistics of the head, counters
            value.copy_(buffers[name])
        for name in expected:
            for a, b in zip(_tensors(expected[name]), _tensors(found[name])):
                if not torch.allclose(a, b, rtol=1e-3, atol=1e-6, equal_nan=True):
                    raise PrefixError(
                        f'prefix_cache: {type(self.model).__name__} reads the images beside its backbone, since '
                        f"without them its '{name}' differs ({float(b.mean()):.4g} instead of {float(a.mean()):.4g}). "
                        'A cache keeps no images: train without prefix_cache'
                    )

    def _first_items(self, source: _Source) -> list[dict[str, Any]]:
        count = len(source.loader.dataset)  # type: ignore[arg-type]
        items = [draw(source.loader.dataset, 0, min(i, count - 1), source.fixed) for i in range(2)]
        if items[0][INPUTS].shape != items[1][INPUTS].shape:
            items[1] = items[0]
        return items

    def _forward(self, source: _Source, items: Sequence[dict[str, Any]]) -> Callable[[], Any]:
        """A function that runs the model on samples, as a step does."""
        data = source.loader.collate_fn(copy.deepcopy(list(items)))

        def run() -> Any:
            before = random_numbers()
            ready = self.model.data_preprocessor(data, source.training)
            if random_numbers() != before:
                raise PrefixError(
                    f'prefix_cache: the data preprocessor {type(self.model.data_preprocessor).__name__} draws random '
                    'numbers, so an image has no prefix of its own. Move the augmentation into the pipeline'
                )
            mode = 'loss' if source.training else 'predict'
            return self.model(**ready, mode=mode) if isinstance(ready, Mapping) else self.model(*ready, mode=mode)

        return run

    def _record(self, source: _Source, items: Sequence[dict[str, Any]]) -> list[list[Values]]:
        """What is recorded of each of some samples, by call of the backbone."""
        self.model.train(source.training)
        # A loss needs one call of the backbone. A prediction may need several, of crops or flipped images.
        with source.context():
            calls = self.prefix.record(self.plan, self._forward(source, items), stop=source.training)
        rows = {value.name: value.rows for value in self.plan.values}
        parts = [{n: t.cpu().split(rows[n]) for n, t in call.items()} for call in calls]
        return [[{n: t[index] for n, t in call.items()} for call in parts] for index in range(len(items))]

    def prepare(self, sources: Sequence[_Source]) -> list[Shards]:
        """Find or fill the caches of all data.

        Returns:
            Their files.
        """
        found = [self._find(source) for source in sources]
        needed = [(s, f) for s, f in zip(sources, found) if on_main_process(f.is_incomplete)]
        on_main_process(lambda: self._check_space(needed))
        for source, cache in needed:
            self._fill(source, cache)
        for source, cache in zip(sources, found):
            shards = cache.shards
            if not shards.per_shard and not shards.find():
                raise PrefixError(
                    f'prefix_cache: {shards.folder} is not there for all processes. Name a `dir` on a disk that they '
                    'share'
                )
            shards.check(source.views)
            self._check_current(source, cache)
        return [cache.shards for cache in found]

    def _find(self, source: _Source) -> _Found:
        """The cache of some data, filled or not, and records of its first images."""
        items = self._first_items(source)
        again = draw(source.loader.dataset, 0, 0, False)
        reproducible = encode(items[0]) == encode(again)
        if source.fixed and not reproducible:
            raise PrefixError(
                f'prefix_cache: the {source.name} pipeline gives another image each time, and views=None keeps one '
                'only. Set `views` to the number of draws of each image, e.g. views=4'
            )
        probes = [pack(item, calls, self.dtype) for item, calls in zip(items, self._record(source, items))]
        with source.context():
            one = torch.ones(1, 1, device=next(self.model.parameters()).device)
            computes_in = str(nn.functional.linear(one, one).dtype)
        made_of = on_main_process(
            lambda: dict(
                prefix=describe_prefix(self.prefix, self.plan),
                preprocessor=describe_preprocessor(self.model.data_preprocessor),
                **describe_data(source.loader.dataset, source.config),
                use=source.name,
                computes_in=computes_in,
                stored_in=self.options.dtype,
            )
        )
        key = digest_of([FORMAT, made_of])
        folder = self.options.dir / f'{source.name}-{key[:16]}'
        return _Found(Shards(folder, key, made_of['images']), source.views, made_of, probes, reproducible)

    def _check_space(self, caches: Sequence[tuple[_Source, _Found]]) -> None:
        if caches:
            what = ' and '.join(
                f'the {s.name} data ({f.shards.images:,} images, {f.views} views, '
                f'{f.record_bytes / 1024:,.0f} KiB each)'
                for s, f in caches
            )
            check_space(self.options.dir, sum(f.bytes_missing() for _, f in caches), what)

    def _check_current(self, source: _Source, cache: _Found) -> None:
        """Compare the first stored record with what pipeline and prefix give now.

        Raises:
            DamagedFileError: They differ.
        """
        stored, fresh = unpack(cache.shards.read(0, 0)), unpack(bytearray(cache.probes[0]))
        calls = [sample.pop(RECORDS).calls for sample in (stored, fresh)]
        fits = len(calls[0]) == len(calls[1]) and all(
            _close(a.get(name), b[name]) for a, b in zip(*calls) for name in b
        )
        if cache.reproducible:
            fits = fits and encode(stored) == encode(fresh)
        if (cache.reproducible or not source.training) and not fits:
            raise DamagedFileError(
                f'{cache.shards.folder} does not hold what the pipeline and the frozen blocks give now (its first '
                f'image differs), although base, pipeline and data are those it was made of. Code of a transform or '
                'of the backbone may have changed: delete the folder, and the cache is made again'
            )

    def _fill(self, source: _Source, cache: _Found) -> None:
        """Compute the shards that are missing; each process computes its part."""
        shards = cache.shards
        with ExitStack() as stack_:
            on_main_process(lambda: stack_.enter_context(filling(shards.folder)) and None)
            on_main_process(lambda: self._begin(source, cache))
            if not is_main_process() and not shards.find():
                shards.per_shard = 0  # told below, together with all other faults
            missing: list[tuple[int, int]] = on_main_process(lambda: shards.missing(source.views))
            fault = None
            try:
                if not shards.per_shard:
                    raise PrefixError(f'{shards.folder} is not there for all processes; name a `dir` that they share')
                self._compute(source, shards, missing[get_rank() :: get_world_size()])
            except (ValueError, RuntimeError, OSError) as error:
                fault = error
            faults = all_gather_object(None if fault is None else str(fault))
            if fault is not None:
                raise fault
            if any(faults):
                raise PrefixError(f'another process: {next(f for f in faults if f)}')
        if is_main_process():
            self.logger.info(
                f'prefix cache of the {source.name} data: {size_of(shards.folder) / 2**20:,.1f} MiB in {shards.folder}'
            )

    def _begin(self, source: _Source, cache: _Found) -> None:
        shards, batch = cache.shards, source.batch_size
        if not shards.find():  # another run may have made it in the meantime
            shards.create(max(1, SHARD // cache.record_bytes // batch) * batch, cache.made_of)

    def _compute(self, source: _Source, shards: Shards, missing: Sequence[tuple[int, int]]) -> None:
        batch = source.batch_size
        batches = [
            (view, shard, list(images[start : start + batch]))
            for view, shard in missing
            for images in [shards.range(shard)]
            for start in range(0, len(images), batch)
        ]
        if not batches:
            return
        drawn = DataLoader(
            Draws(source.loader.dataset, source.fixed),
            batch_sampler=[[(view, image) for image in images] for view, _, images in batches],
            collate_fn=list,
            num_workers=source.loader.num_workers,
            multiprocessing_context=source.loader.multiprocessing_context,
        )
        columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not is_main_process(), transient=True) as progress:
            bar = progress.add_task(
                f'frozen prefix of the {source.name} data', total=sum(len(images) for *_, images in batches)
            )
            records: list[bytes] = []
            sizes = _Sizes(source)
            for (view, shard, images), items in zip(batches, drawn):
                sizes.check(images, items, self.model.data_preprocessor)
                # A batch of the size that is trained on, so that kernels compute the same bits.
                whole = items + items[-1:] * (batch - len(items))
                recorded = self._record(source, whole)
                records += [pack(item, calls, self.dtype) for item, calls in zip(items, recorded)]
                if images[-1] == shards.range(shard)[-1]:
                    shards.write(view, shard, records)
                    records = []
                progress.update(bar, advance=len(images))


@dataclass
class _Found:
    """A cache that may have to be filled.

    Attributes:
        shards: Its files.
        views: Views that are needed.
        made_of: What it is made of.
        probes: Records of its first images, computed now.
        reproducible: Whether the pipeline gives the same for the same seed.
    """

    shards: Shards
    views: int
    made_of: dict[str, Any]
    probes: list[bytes]
    reproducible: bool

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, about."""
        return sum(map(len, self.probes)) // len(self.probes)

    def is_incomplete(self) -> bool:
        """Whether a shard is missing."""
        return not self.shards.find() or bool(self.shards.missing(self.views))

    def bytes_missing(self) -> int:
        """Bytes that are still to be written, about."""
        images = self.shards.images * self.views
        if self.shards.per_shard:
            images = sum(len(self.shards.range(shard)) for _, shard in self.shards.missing(self.views))
        return images * self.record_bytes


class _Sizes:
    """Checks that images which may meet in a batch are of one size.

    Args:
        source: The data.
    """

    def __init__(self, source: _Source) -> None:
        self.source = source
        self.first: tuple[int, torch.Size] | None = None

    def check(self, images: Sequence[int], items: Sequence[dict[str, Any]], preprocessor: Any) -> None:
        """Check some samples.

        Raises:
            PrefixError: Two differ in size after padding, so that a batch would pad one to the size of the other.
        """
        if self.source.batch_size == 1:
            return
        for image, item in zip(images, items):
            shape = item[INPUTS].shape
            if self.first is None:
                self.first = image, shape
            if shape == self.first[1]:
                continue
            loader = 'train_dataloader' if self.source.training else 'val_dataloader'
            raise PrefixError(
                f'prefix_cache: images {self.first[0]} and {image} of the {self.source.name} data have the sizes '
                f'{tuple(self.first[1][1:])} and {tuple(shape[1:])} after the pipeline. A batch pads them to its '
                'largest, so what the frozen blocks give depends on the batch. End the pipeline with one size for '
                f"all, e.g. dict(type='Pad', size=(H, W)) before it packs, or set {loader}.batch_size=1"
            )


def _tensors(loss: Any) -> list[torch.Tensor]:
    return [loss] if isinstance(loss, torch.Tensor) else [x for x in loss if isinstance(x, torch.Tensor)]


def _close(stored: torch.Tensor | None, fresh: torch.Tensor) -> bool:
    """Whether a stored tensor is what is computed now, up to rounding and other kernels."""
    if stored is None or stored.shape != fresh.shape or stored.dtype != fresh.dtype:
        return False
    a, b = stored.double(), fresh.double()
    return bool((a - b).abs().amax() <= _ROUNDING.get(fresh.dtype, _ANOTHER_MACHINE) * b.abs().amax())
