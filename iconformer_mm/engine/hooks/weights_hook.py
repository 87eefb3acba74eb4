"""Accounting of every tensor of a runner's model after weights are loaded."""

from __future__ import annotations

import copy
from typing import Any

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner

from iconformer_mm.checkpoint import describe_base, initialise_base, put_adapter
from iconformer_mm.checkpoint.tuned_state import file_names, heads_of
from iconformer_mm.engine.optim_wrapper_constructor import describe_groups
from iconformer_mm.registry import is_type
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.accounting import (
    NO_WEIGHTS,
    NOTE,
    LoadRecord,
    WeightsError,
    adopt_output_norms,
    check_averages,
    check_training,
    describe_training,
    parameters_from_hub,
    recorded_training,
    require_all,
    some,
)
from iconformer_mm.tuning.backbones import is_below, join
from iconformer_mm.tuning.freezing import FrozenParts
from iconformer_mm.tuning.injection import backbones_of, unwrap

from ..large_bases import fill
from .adapter_checkpoint_hook import AdapterCheckpointHook


@HOOKS.register_module()
class WeightsHook(Hook):
    """Checks that the tensors to train, validate or test come from the files.

    Before anything is loaded, it compares the PEFT method of a checkpoint with the model's. After loading,
    each tensor is loaded, or new and trained, or an error. In tests and on resuming, every tensor must be in the
    checkpoint. Before training, every frozen tensor must be loaded. The only exception is a model without any
    weights: it is trained with a warning.

    ``load_from`` also accepts adapter files, with the checks of :func:`iconformer_mm.load_adapter`.
    Training continues from their tensors.

    :class:`PEFTHook` does all of this as well. The command-line tools register this hook if there is no PEFTHook.

    Raises:
        WeightsError: A tensor is not accounted for, or the methods differ.
    """

    priority = 'HIGHEST'

    def __init__(self) -> None:
        self._record: LoadRecord | None = None
        self._checked = False
        #: The base of a model that a strategy wraps, as describe_base returns it.
        self.base_before_wrap: dict[str, Any] | None = None

    def before_run(self, runner: Runner) -> None:
        """Start to record what is loaded."""
        if self._record is None and not self._checked:
            self._record = LoadRecord(unwrap(runner.model))

    def before_prepare(self, runner: Runner) -> None:
        """Start to record what is loaded into the bare model of a CheckedFlexibleRunner, and load shards."""
        self._record = LoadRecord(runner.model)
        fill(runner.model, self._record)

    def before_wrap(self, runner: Runner) -> None:
        """Check that the bare model of a CheckedFlexibleRunner is complete, and describe its base.

        Once it is sharded, no process has the whole base.
        """
        if not _is_training(runner):
            self._require_all(runner)
            return
        self._require_trained_on(runner)
        injection = get_injection(runner.model)
        if injection is not None and injection.method.freezes:
            self.base_before_wrap = describe_base(runner.model)

    # Loading

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the checkpoint's PEFT method with the model's before it is loaded."""
        model, injection, source = unwrap(runner.model), get_injection(runner.model), str(runner._load_from)
        whole = runner._resume or not _is_training(runner)
        if self._record is not None and whole:
            self._record.restart()
        check_training(checkpoint, model, injection, source, whole)
        if 'adapter_file' in checkpoint:
            self._take_adapter_file(runner, checkpoint, source)
            return
        if NOTE in checkpoint and not any(isinstance(hook, AdapterCheckpointHook) for hook in runner.hooks):
            raise WeightsError(
                f'{source} holds only the trained tensors, not the base. To load it, set '
                "default_hooks.checkpoint.type='AdapterCheckpointHook'"
            )
        trained = (recorded_training(checkpoint) or {}).get('trained') or ()
        if injection is not None and (whole or trained):
            adopt_output_norms(injection, trained)
            self._rebuild_for_norms(runner)
        if runner._resume:
            check_averages(checkpoint, source, any(isinstance(hook, EMAHook) for hook in runner.hooks))

    def _take_adapter_file(self, runner: Runner, checkpoint: dict, source: str) -> None:
        """Load an adapter file into the model, and give MMEngine the resulting state."""
        if runner._resume:
            raise WeightsError(
                f'{source} is an adapter file: it has no optimizer state and no training position to resume from. To '
                'train on from it, set it as `load_from` without resuming, or resume from a checkpoint'
            )
        model = unwrap(runner.model)
        if get_injection(model) is None:
            raise WeightsError(
                f'{source} is an adapter file, but the model is not adapted. Name its method with --peft, or with a '
                'PEFTHook in the config'
            )
        content, tensors = checkpoint.pop('adapter_file'), checkpoint['state_dict']
        initialise_base(model, content)
        put_adapter(model, content, tensors, source)
        state, paths = model.state_dict(), list(backbones_of(model))
        names = file_names(state, paths, heads_of(model))
        checkpoint['state_dict'] = {
            n: v.clone() for n, v in state.items() if names[n] in tensors or '' in paths or is_below(n, paths)
        }
        runner.logger.info(f'the adapter file {source} is loaded')

    # Accounting

    def before_train(self, runner: Runner) -> None:
        """Check that every frozen tensor was loaded, and on resuming every other tensor, too."""
        self._rebuild_for_norms(runner)
        self._require_trained_on(runner)

    def _require_trained_on(self, runner: Runner) -> None:
        record, self._record, self._checked = self._record, None, True
        if record is None:
            return
        record.close()
        if runner._resume and record.begun:
            require_all(record, str(runner._load_from))
        injection = get_injection(runner.model)
        accounts = {} if injection is None else injection.accounts
        missing = [join(path, name) for path, account in accounts.items() for name in account.missing]
        if record.begun and not missing:
            _refuse_random_parts(record)
        if not missing:
            return
        if not record.begun:
            runner.logger.warning(NO_WEIGHTS)
            return
        raise WeightsError(
            f'weights were loaded, but {len(missing)} frozen tensors of the backbone were in none of the files, such '
            f'as {some(missing)}; they would stay random. Name the weights of the backbone in init_cfg with '
            "type='Pretrained', or in load_from"
        )

    def before_val(self, runner: Runner) -> None:
        """Check that every tensor was loaded, in a validation without training."""
        self._require_all(runner)

    def before_test(self, runner: Runner) -> None:
        """Check that every tensor was loaded."""
        self._require_all(runner)

    def _require_all(self, runner: Runner) -> None:
        if self._checked or self._record is None:
            return
        self._checked = True
        given = runner.cfg.get('model') is None or getattr(self._record.model, 'is_init', False)
        if not self._record.begun and given:
            return  # the model was loaded when it was built
        if not self._record.begun:
            raise WeightsError(
                'there are no weights: the model would be tested with its initial values. Set a checkpoint (load_from)'
            )
        require_all(self._record, str(runner._load_from))

    # Saving

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Record how the model was adapted."""
        injection = get_injection(runner.model)
        if injection is not None:
            checkpoint['meta'][NOTE] = describe_training(injection)

    # Optimization

    def _rebuild_for_norms(self, runner: Runner) -> None:
        """Rebuild the optimizer if it lacks output norms that turned out to be new."""
        injection = get_injection(runner.model)
        if injection is None or not isinstance(runner.optim_wrapper, OptimWrapper):
            return
        optimized = {id(p) for group in runner.optim_wrapper.param_groups for p in group['params']}
        trained = {
            id(injection.backbones[path].get_parameter(name))
            for path, account in injection.accounts.items()
            for name in account.norms
        }
        if trained <= optimized:
            return
        if is_model_wrapper(runner.model):
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), runner.model.module)
        self.rebuild_optimization(runner)
        if isinstance(runner._train_loop, BaseLoop):
            runner.optim_wrapper.initialize_count_status(
                runner.model, runner._train_loop.iter, runner._train_loop.max_iters
            )

    def rebuild_optimization(self, runner: Runner) -> None:
        """Rebuild optimizer and schedulers over the trainable parameters.

        Args:
            runner: The runner.

        Raises:
            ValueError: The runner has no config to build them from.
        """
        optim_wrapper = over_trainable(runner.cfg.get('optim_wrapper'))
        schedulers, runner.param_schedulers = runner.param_schedulers, None
        runner.optim_wrapper = runner.build_optim_wrapper(optim_wrapper)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        if schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(copy.deepcopy(runner.cfg.param_scheduler))
        runner.logger.info(f'\n{describe_groups(unwrap(runner.model), runner.optim_wrapper)}')


def over_trainable(optim_wrapper: Any) -> dict[str, Any]:
    """Copy the config of an optimizer wrapper, and restrict it to trainable parameters.

    Args:
        optim_wrapper: The config.

    Raises:
        ValueError: It is not the config of a single optimizer.
    """
    optim_wrapper = copy.deepcopy(optim_wrapper)
    if not isinstance(optim_wrapper, dict) or not isinstance(optim_wrapper.get('optimizer'), dict):
        raise ValueError(
            'PEFTHook cannot rebuild the optimizer: the runner has a built optimizer, or several, and no '
            '`optim_wrapper` config. Call iconformer_mm.inject(model) before you create the optimizer instead.'
        )
    constructor = optim_wrapper.get('constructor', 'DefaultOptimWrapperConstructor')
    if not is_type(dict(type=constructor), 'PEFTOptimWrapperConstructor'):
        optim_wrapper['constructor'] = 'PEFTOptimWrapperConstructor'
        optim_wrapper['paramwise_cfg'] = {**(optim_wrapper.get('paramwise_cfg') or {}), 'constructor': constructor}
    return optim_wrapper


def _refuse_random_parts(record: LoadRecord) -> None:
    """Refuse parameters outside of the backbones that are frozen (``freeze``) and were in none of the files.

    Raises:
        WeightsError: There are some, such as those of a frozen head for new classes.
    """
    parts = vars(record.model).get(FrozenParts.KEY)
    absent = record.missing()
    given = parameters_from_hub(record.model)
    random = [absent[name] for name in parts.names if name in absent and name not in given] if parts else []
    if random:
        raise WeightsError(
            f'weights were loaded, but {len(random)} parameters that `freeze` names were in none of the files, such as '
            f'{some(random)}; they would stay random. A head for other classes must be trained: take it out of `freeze`'
        )


def _is_training(runner: Runner) -> bool:
    """Whether a run trains. MMEngine builds the train loop only then."""
    return isinstance(runner._train_loop, BaseLoop)
