"""Adapting the model of any MMEngine config without changes to its model dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import nn

from iconformer_mm.checkpoint import adapter_of, write_adapter
from iconformer_mm.checkpoint.sharded import class_name, is_sharded
from iconformer_mm.datasets.checks import check_dataset
from iconformer_mm.files import write_json
from iconformer_mm.tuning import get_injection, inject, summarize
from iconformer_mm.tuning.frozen_precision import check_frozen_dtype
from iconformer_mm.tuning.injection import Injection, unwrap
from iconformer_mm.tuning.summary import SUMMARY_FILE
from iconformer_mm.tuning.without_gradient import GradientWatch

from ..load_log import note_fresh_adapters
from ..prefix_cache import PrefixCache, PrefixCacheOptions
from ..runner import CheckedRunner, check_loop
from .adapter_checkpoint_hook import averaged_model, diverged_in
from .weights_hook import WeightsHook, over_trainable


@HOOKS.register_module()
class PEFTHook(WeightsHook):
    """Injects a PEFT method into the runner's model, in training, validation and test.

    It acts before all other hooks, and before weights are initialised, loaded or
    resumed. In training it rebuilds from the runner's config what was built for the
    old parameters: the distributed wrapper, the optimizer wrapper (over trainable
    parameters only) and the schedulers. It logs the summary. When training begins,
    it writes the summary to ``peft_summary.json`` in the work directory. When
    training ends, it writes the trained tensors to ``adapter.safetensors`` there.
    With ``EMAHook`` these are the averaged weights, which validation measured. A
    diverged run has NaN or infinite values in them. It logs a warning and does not
    overwrite an existing file.

    With MMEngine's FlexibleRunner (``runner_type='FlexibleRunner'``) it adapts the model before the strategy
    (DDP, FSDP, DeepSpeed) wraps it. See docs/several_gpus.md.

    It also does what :class:`WeightsHook` does: it raises an error if a tensor is in none of the files but
    should be. Output norms that the weights lack are trained with the adapters. For example, ImageNet weights
    lack the output norms of a detector.

    Args:
        method: Name or config of the PEFT method. Defaults to None, ``icon``.
        save_adapter: Whether to write the adapter file after training. ``'raw'`` writes the
            weights themselves if validation measured their average. Defaults to True.
        frozen_dtype: Precision to hold the frozen matrices in: ``'bfloat16'``, ``'int8'``, ``'nf4'`` or
            ``'float8'``, see :func:`iconformer_mm.inject`. Defaults to None, their own dtype.
        with_cp: Whether adapted blocks, or layers of other towers, are recomputed in the backward pass (gradient
            checkpointing). Defaults to False, the backbone's own setting.
        blocks: The blocks to adapt, see :func:`iconformer_mm.inject`. Defaults to ``'all'``.
        unfreeze: Patterns of the backbone's own parameters to train as well. Defaults to none.
        freeze: Patterns of parameters outside the backbone that are not trained. Defaults to none.
        backbones: Paths of the backbones in a model that has several. Defaults to None, the only one.
        families: Families of further blocks, see :func:`iconformer_mm.inject`, e.g.
            ``[dict(like='mmdet Swin', block='my_project.swin.SwinBlock')]``. Defaults to none.
        where: The modules to adapt, by path or pattern, e.g. ``['encoder', 'decoder']``. Defaults to None, the
            backbone.
        methods: A method for each module, in the place of ``method`` and ``where``, see
            :func:`iconformer_mm.inject`. Defaults to None, one method.
        prefix_cache: Compute what comes before the first adapted block once, and read it in every epoch:
            ``dict(dir=..., views=4, dtype='bfloat16')``, see
            :class:`~iconformer_mm.engine.prefix_cache.PrefixCacheOptions`. Defaults to None, no cache.

    Raises:
        MissingExtraError: ``frozen_dtype`` needs torchao, which is not installed or too old.
        ValueError: The model is already adapted or lacks what was selected, an option is unknown, the runner has no
            config to rebuild its parts from, it is a FlexibleRunner that build_runner did not build, or no gradient
            came back to an adapted module in the first step that ran it.
        WeightsError: A tensor is not accounted for, or a checkpoint is of another method.
        DataError: The data does not fit the model.
        PrefixError: The model or the data cannot be cached, or the disk has no room.
        DamagedFileError: A file of a cache is truncated, altered or of another cache.

    Example:
        >>> custom_imports = dict(imports=['iconformer_mm'])
        >>> custom_hooks = [dict(type='PEFTHook', method=dict(type='icon', bottleneck=64))]
    """

    def __init__(
        self,
        method: str | dict | None = None,
        save_adapter: bool | str = True,
        frozen_dtype: str | None = None,
        with_cp: bool = False,
        blocks: str | Sequence[int | str] = 'all',
        unfreeze: Sequence[str] = (),
        freeze: Sequence[str] = (),
        backbones: Sequence[str] | None = None,
        families: Sequence[dict] = (),
        prefix_cache: Mapping[str, Any] | None = None,
        where: str | Sequence[str] | None = None,
        methods: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if save_adapter not in (True, False, 'raw'):
            raise ValueError(f"save_adapter must be True, False or 'raw', got {save_adapter!r}")
        if frozen_dtype is not None:
            check_frozen_dtype(frozen_dtype)
        self.method = method
        self.save_adapter = save_adapter
        self.frozen_dtype = frozen_dtype
        self.with_cp = with_cp
        self.blocks = blocks
        self.unfreeze = unfreeze
        self.freeze = freeze
        self.backbones = backbones
        self.families = families
        self.prefix_cache = prefix_cache
        self.where = where
        self.methods = methods
        self._cache = None if prefix_cache is None else PrefixCache(PrefixCacheOptions.of(prefix_cache))
        self._injection: Injection | None = None
        self._watch: GradientWatch | None = None

    def before_run(self, runner: Runner) -> None:
        """Adapt the model, and rebuild the parts that hold its old parameters."""
        if self._injection is not None and get_injection(runner.model) is self._injection:
            return  # train(), val() and test() of one runner each call this method
        if hasattr(runner, 'strategy'):
            raise ValueError(
                "FlexibleRunner has wrapped the model before PEFTHook could adapt it: set runner_type='FlexibleRunner' "
                'and build the runner by iconformer_mm.engine.build_runner, as `iconformer train` does'
            )
        if not isinstance(runner, CheckedRunner):  # a CheckedRunner has checked its data already
            self._check_data(runner)
        wrapped = is_model_wrapper(runner.model)
        model = runner.model.module if wrapped else runner.model
        self._inject(runner, model)
        if wrapped:
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), model)
        if isinstance(runner.optim_wrapper, (OptimWrapper, OptimWrapperDict)):
            self.rebuild_optimization(runner)
        super().before_run(runner)

    def before_prepare(self, runner: Runner) -> None:
        """Adapt the bare model of a CheckedFlexibleRunner, whose strategy then builds the optimizer over it."""
        if self._cache is not None:
            raise ValueError(
                "prefix_cache needs MMEngine's Runner: leave runner_type out, or leave prefix_cache out of the PEFTHook"
            )
        self._inject(runner, runner.model)
        if runner.optim_wrapper is not None:
            runner.optim_wrapper = over_trainable(runner.optim_wrapper)
        super().before_prepare(runner)

    def _inject(self, runner: Runner, model: nn.Module) -> None:
        summary = inject(
            model,
            self.method,
            self.frozen_dtype,
            self.with_cp,
            blocks=self.blocks,
            unfreeze=self.unfreeze,
            freeze=self.freeze,
            backbones=self.backbones,
            families=self.families,
            where=self.where,
            methods=self.methods,
        )
        self._injection = get_injection(model)
        runner.logger.info(f'\n{summary}')
        note_fresh_adapters(runner.logger)

    def before_train(self, runner: Runner) -> None:
        """Check the weights, and write the summary, which includes output norms that turned out to be new."""
        super().before_train(runner)
        if is_main_process():
            write_json(Path(runner.work_dir) / SUMMARY_FILE, asdict(summarize(unwrap(runner.model))))
        if self._cache is not None:
            self._cache.begin(runner)
        if self._injection is not None and not runner.cfg.get('compile'):  # compiled code keeps the hooks it began with
            self._watch = GradientWatch(self._injection.learning_modules())

    # With a prefix cache, this hook takes what was recorded out of a batch before anything else sees it.

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin a step at the first adapted block, if there is a prefix cache."""
        if self._watch is not None:
            self._watch.begin()
        if self._cache is not None:
            self._cache.enter(data_batch)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """End the step.

        Raises:
            ValueError: An adapted module ran, and no gradient came back to it.
        """
        if self._cache is not None:
            self._cache.leave()
        if self._watch is not None:
            self._watch.end()

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin a step of a validation that is cached."""
        if self._cache is not None and self._cache.reads(runner.val_loop):
            self._cache.enter(data_batch)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Sequence | None = None
    ) -> None:
        """End the step."""
        if self._cache is not None:
            self._cache.leave()

    @staticmethod
    def _check_data(runner: Runner) -> None:
        for loop in (runner._train_loop, runner._val_loop, runner._test_loop):
            dataset = getattr(getattr(loop, 'dataloader', None), 'dataset', None)
            if dataset is not None:
                check_dataset(dataset)
                check_loop(runner, loop, training=loop is runner._train_loop)

    def after_train(self, runner: Runner) -> None:
        """Write the adapter file."""
        if self._watch is not None:
            self._watch.release()
        if self._cache is not None:
            self._cache.end()
        self._save_adapter(runner)

    def _save_adapter(self, runner: Runner) -> None:
        if not self.save_adapter or self._injection is None or not self._injection.method.freezes:
            return
        if not is_main_process() and not is_sharded(unwrap(runner.model)):
            return  # all processes gather a sharded model
        path = Path(runner.work_dir) / 'adapter.safetensors'
        fault = diverged_in(runner)
        if fault is not None:
            if is_main_process():
                runner.logger.warning(f'{path} is not written because the training diverged: {fault}')
            return
        averaged = None if self.save_adapter == 'raw' else averaged_model(runner)
        model = unwrap(runner.model) if averaged is None else averaged
        classes = (getattr(runner.train_dataloader.dataset, 'metainfo', None) or {}).get('classes')
        notes = dict(epoch=runner.epoch, iter=runner.iter, weights='raw' if averaged is None else 'averaged')
        content, tensors = adapter_of(
            model, metadata=notes, task=class_name(model), classes=classes, base=self.base_before_wrap
        )
        if is_main_process():
            write_adapter(path, content, tensors)
            runner.logger.info(f'Adapter file ({path.stat().st_size / 2**20:.2f} MiB) saved to {path}')
