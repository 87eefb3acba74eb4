"""MMEngine's FlexibleRunner for adapted models."""

from __future__ import annotations

from typing import Any

from mmengine._strategy import BaseStrategy, DDPStrategy
from mmengine.hooks import EMAHook
from mmengine.registry import RUNNERS, STRATEGIES
from mmengine.runner import BaseLoop, FlexibleRunner, find_latest_checkpoint
from mmengine.runner.checkpoint import _load_checkpoint, _load_checkpoint_to_model
from torch import nn
from torch.utils.data import DataLoader

from iconformer_mm.checkpoint.training_checkpoint import check_resumable
from iconformer_mm.registry import type_name
from iconformer_mm.tuning.unused import unused_adapters

from .deepspeed_strategy import AdapterDeepSpeedStrategy
from .large_bases import without_values
from .runner import CheckedRunner, check_loop
from .strategies import complete_strategy


@RUNNERS.register_module()
class CheckedFlexibleRunner(FlexibleRunner):
    """MMEngine's FlexibleRunner with checks of the data, for adapted models.

    A strategy builds, initialises and wraps a model and builds its optimizer in one call. This runner does what needs
    the bare model before that call: hooks inject adapters (``before_prepare``), weights are initialised and loaded,
    and every tensor is accounted for (``before_wrap``). The strategy then wraps a complete model. After it, optimizer
    and position of a resumed run are loaded.

    A backbone whose ``init_cfg`` names an index of safetensors shards is built without values, adapted, and filled
    tensor by tensor. See :func:`iconformer_mm.checkpoint.load_shards`.

    The command-line tools use it if the config sets ``runner_type='FlexibleRunner'``.

    Args:
        *args: Arguments of MMEngine's FlexibleRunner.
        **kwargs: The same. ``strategy`` is completed by :func:`~iconformer_mm.engine.strategies.complete_strategy`.

    Raises:
        ImportError: The strategy's library is not installed.
        ValueError: An option of the strategy cannot be kept, or there is an ``EMAHook``.
    """

    model: Any
    _train_loop: Any
    _val_loop: Any
    _test_loop: Any
    _load_from: Any
    _resume: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._is_ready = False
        self._resumed: dict[str, Any] | None = None
        if kwargs.get('env_cfg') is None:
            kwargs['env_cfg'] = {}
        self._find_unused_parameters = bool((kwargs.get('cfg') or {}).get('find_unused_parameters', False))
        super().__init__(*args, **kwargs)
        if any(isinstance(hook, EMAHook) for hook in self.hooks):
            raise ValueError(
                "EMAHook averages a model that is not wrapped: remove it, or train with MMEngine's Runner (without "
                'runner_type)'
            )

        if isinstance(self.strategy, AdapterDeepSpeedStrategy):
            self.strategy.check_optim_wrapper(self.optim_wrapper)

    def build_strategy(
        self, strategy: BaseStrategy | dict | None = None, launcher: str = 'none', **kwargs: Any
    ) -> BaseStrategy:
        """Build the strategy, checked and completed for this machine."""
        if not isinstance(strategy, BaseStrategy):
            strategy = complete_strategy(strategy, launcher, self._find_unused_parameters)
            if type_name(strategy) in STRATEGIES.module_dict:  # not looked for in a library's scope first
                strategy['_scope_'] = 'mmengine'
        return super().build_strategy(strategy, launcher=launcher, **kwargs)

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict, seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader:
        """Build a data loader, and check its data set. See :class:`CheckedRunner`."""
        return CheckedRunner.build_dataloader(dataloader, seed, diff_rank_seed)

    def build_train_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop, and check that model and data fit."""
        return self._checked(super().build_train_loop, loop, training=True)

    def build_val_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop, and check that model, metrics and data fit."""
        return self._checked(super().build_val_loop, loop)

    def build_test_loop(self, loop: BaseLoop | dict) -> BaseLoop:
        """Build the loop, and check that model, metrics and data fit."""
        return self._checked(super().build_test_loop, loop)

    def _checked(self, build: Any, loop: BaseLoop | dict, training: bool = False) -> BaseLoop:
        if isinstance(loop, BaseLoop):
            return loop
        built = build(loop)
        check_loop(self, built, training)
        return built

    def train(self) -> nn.Module:
        """Adapt, initialise and load the model, then train as MMEngine does."""
        self._build_model()
        if self._train_loop is not None:  # otherwise MMEngine raises
            self._train_loop = self.build_train_loop(self._train_loop)
            if self._val_loop is not None:
                self._val_loop = self.build_val_loop(self._val_loop)
            self._make_ready(initialise=True)
        return super().train()

    def val(self) -> dict:
        """Adapt and load the model, then validate as MMEngine does."""
        self._build_model()
        if self._val_loop is not None:
            self._val_loop = self.build_val_loop(self._val_loop)
            self._make_ready(initialise=False)
        return super().val()

    def test(self) -> dict:
        """Adapt and load the model, then test as MMEngine does."""
        self._build_model()
        if self._test_loop is not None:
            self._test_loop = self.build_test_loop(self._test_loop)
            self._make_ready(initialise=False)
        return super().test()

    def _build_model(self) -> None:
        if not isinstance(self.model, nn.Module):
            self.model = self.strategy.build_model(without_values(self.model))

    def _make_ready(self, initialise: bool) -> None:
        """Do what needs the bare model."""
        if self._is_ready:
            return
        self._is_ready = True
        self.call_hook('before_prepare')
        if initialise:
            self.model = self.strategy._init_model_weights(self.model)
        # The strategy must not initialise what is loaded now.
        self.strategy.dispatch_kwargs['init_weights_for_test_or_val'] = False
        self.cfg.init_weights_for_test_or_val = False
        self._load_weights()
        self.call_hook('before_wrap')
        if type(self.strategy) is DDPStrategy and not (self.strategy.model_wrapper or {}).get('find_unused_parameters'):
            unused = unused_adapters(self.model)
            if unused is not None:
                raise ValueError(unused)

    def _load_weights(self) -> None:
        if isinstance(self._resume, str):
            self._load_from = self._resume
        elif self._resume and self._load_from is None:
            self._load_from = find_latest_checkpoint(self.work_dir)
            self._resume = self._load_from is not None
        if self._load_from is None:
            return
        self.logger.info(f'{"Resume" if self._resume else "Load"} checkpoint from {self._load_from}')
        checkpoint = _load_checkpoint(self._load_from, map_location='cpu')
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        _load_checkpoint_to_model(self.model, checkpoint, revise_keys=[(r'^module\.', '')])
        if self._resume:
            checkpoint.pop('state_dict', None)
            self._resumed = checkpoint

    def load_or_resume(self) -> None:
        """Load what belongs to the optimizer and to the loop. The weights are loaded already."""
        checkpoint, self._resumed = self._resumed, None
        self._has_loaded = True
        if checkpoint is None:
            return
        check_resumable(checkpoint, self)
        self.strategy.load_optim_state_dict(checkpoint['optimizer'])
        if self.param_schedulers is not None:
            self.strategy.load_scheduler_state_dict(checkpoint['param_schedulers'])
        meta = checkpoint['meta']
        self._restore_seed(meta.get('seed'))
        assert isinstance(self._train_loop, BaseLoop)  # only a training resumes
        self._train_loop._epoch, self._train_loop._iter = meta['epoch'], meta['iter']
        if getattr(self.optim_wrapper, '_accumulative_counts', 1) > 1:
            self.optim_wrapper.initialize_count_status(self.model, meta['iter'], self.max_iters)
        self.message_hub.load_state_dict(checkpoint['message_hub'])
        self.logger.info(f'resumed epoch: {self.epoch}, iter: {self.iter}')

    def _restore_seed(self, seed: int | None) -> None:
        own = self.strategy._randomness.get('seed')
        if seed is None or seed == own:
            return
        if own is not None:
            self.logger.warning(f"the checkpoint was trained with seed {seed}, the config's {own} is not used")
        self.strategy._randomness.update(seed=seed)
        self.strategy._set_randomness(**self.strategy._randomness)
