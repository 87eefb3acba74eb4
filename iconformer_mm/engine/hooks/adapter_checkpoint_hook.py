"""Checkpoints of the trained tensors, from which a run resumes exactly."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from mmengine.dist import all_gather_object, broadcast_object_list, get_rank, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner, load_checkpoint
from mmengine.runner import checkpoint as checkpoint_module
from mmengine.runner import runner as runner_module
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from iconformer_mm.checkpoint import (
    DamagedFileError,
    base_difference,
    base_of,
    describe_base,
    initialise_base,
    load_safetensors,
)
from iconformer_mm.checkpoint.divergence import diverged_error, find_diverged
from iconformer_mm.checkpoint.filename_template import FilenameTemplate
from iconformer_mm.checkpoint.reading import read_checkpoint, state_dict_of
from iconformer_mm.checkpoint.safetensors_io import read_safetensors, shortened
from iconformer_mm.checkpoint.sharded import class_name, is_sharded, placed_like, whole, wholes
from iconformer_mm.checkpoint.training_checkpoint import (
    check_note,
    check_resumable,
    is_checkpoint,
    raw_state,
    save_checkpoint,
)
from iconformer_mm.checkpoint.tuned_state import frozen_state, heads_of
from iconformer_mm.files import expanded, remove_abandoned
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.accounting import (
    NOTE,
    WeightsError,
    adopt_output_norms,
    check_training,
    describe_training,
)
from iconformer_mm.tuning.injection import backbones_of, unwrap

from ..strategies import FullyShardStrategy

BEST = 'best_'  # MMEngine's prefix for names of the best checkpoints

Outcome = TypeVar('Outcome')


@HOOKS.register_module()
class AdapterCheckpointHook(CheckpointHook):
    """MMEngine's CheckpointHook for adapted models: a few MB per checkpoint instead of the whole model.

    A checkpoint holds adapters, neck and head, their optimizer state, the
    schedulers, the position in the loop, the random states of all processes,
    gradients waiting for accumulation, and any EMA weights. It does not hold the
    frozen base, only its fingerprint. It is a safetensors file, written to a
    temporary file first. An outdated checkpoint is removed after the new one is
    complete. Reading a checkpoint executes nothing.

    On a CPU, a resumed run is bit-identical to an uninterrupted one, as far as the
    data loader allows. Worker processes start again. This matters if they outlive
    an epoch (``persistent_workers``, iteration-based loops): the order of the
    samples is the same, but their augmentation is not. To keep runs identical,
    validation does not change the random state of training.

    With ``resume=True`` and no file, the run resumes from the newest intact
    checkpoint. Damaged ones are skipped with a warning. The first process decides
    for all processes.

    A checkpoint notes where the base came from, for information only. A path in a
    file is never opened or removed. With ``EMAHook``, ``state_dict`` holds the
    averaged weights, which validation measured, as in MMEngine.

    A diverged run has NaN or infinite values in its trained tensors. It logs a
    warning, writes no more checkpoints and removes none.

    Args:
        *args: Arguments of MMEngine's hook (``interval``, ``by_epoch``,
            ``max_keep_ckpts``, ``save_best``, ``rule``, ...).
        filename_tmpl: File name with a placeholder for the epoch or iteration, such
            as ``'epoch_{:03d}.safetensors'``. Defaults to None, which means
            ``'epoch_{}.safetensors'`` or ``'iter_{}.safetensors'``.
        base: Checkpoint of the base weights. It is needed to resume or test a run whose base
            came from ``load_from``, because ``load_from`` then names the checkpoint. The tools
            set it to the config's ``load_from`` or to ``--base``. Defaults to None, the weights
            in ``init_cfg``.
        **kwargs: Arguments of MMEngine's hook.

    Raises:
        ValueError: The file name does not end in ``.safetensors``, its number
            cannot be parsed back, the folder is not local, or
            ``published_keys`` are given (create an adapter file instead).

    Example:
        >>> default_hooks = dict(checkpoint=dict(type='AdapterCheckpointHook', interval=1, max_keep_ckpts=2))
    """

    file_backend: Any  # MMEngine's hook creates it before training
    out_dir: Any

    def __init__(
        self, *args: Any, filename_tmpl: str | None = None, base: str | os.PathLike | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, filename_tmpl=filename_tmpl, **kwargs)
        if filename_tmpl is None:
            self.filename_tmpl = 'epoch_{}.safetensors' if self.by_epoch else 'iter_{}.safetensors'
        if not self.filename_tmpl.endswith('.safetensors'):
            raise ValueError(f"filename_tmpl must end in '.safetensors', got '{self.filename_tmpl}'")
        self._template = FilenameTemplate(self.filename_tmpl)
        if '://' in str(self.out_dir or ''):
            raise ValueError(f'AdapterCheckpointHook writes to local folders only, got out_dir={self.out_dir}')
        if self.out_dir is not None:
            self.out_dir = str(expanded(self.out_dir))
        if self.published_keys is not None:
            raise ValueError(
                'published_keys are not supported: publish an adapter file, `tools/adapter.py extract CHECKPOINT`'
            )
        self.base = None if base is None else os.fspath(base)
        self._loader: _BaseFiller | None = None
        self._resumed: dict | None = None
        self._source: str | None = None  # of base weights from `load_from`
        self._base: dict[str, Any] | None = None
        self._before_val: dict | None = None
        self._rank_states: list[dict] = []
        self._written: list[Path] = []
        self._scores: dict[str, float] | None = None  # of the weights being written
        self._diverged: str | None = None

    # Loading

    def before_prepare(self, runner: Runner) -> None:
        """Do what :meth:`before_run` does, before a CheckedFlexibleRunner wraps the model."""
        self.before_run(runner)

    def before_wrap(self, runner: Runner) -> None:
        """Take the PEFTHook's description of the base. Once the model is sharded, no process has the whole of it."""
        described = (getattr(hook, 'base_before_wrap', None) for hook in runner.hooks)
        self._base = next(filter(None, described), None)

    def before_run(self, runner: Runner) -> None:
        """Check the model, and choose the checkpoint to resume from."""
        if self._loader is not None:
            return
        injection = get_injection(runner.model)
        if injection is None or not injection.method.freezes:
            raise ValueError(
                'AdapterCheckpointHook does not save the backbone, so the backbone must be adapted and frozen, but it '
                f"is {'not adapted' if injection is None else 'trained itself'}; use MMEngine's CheckpointHook, or a "
                'PEFT method that freezes it'
            )
        # It must act before EMAHook. Inserting it at the front of the list that the runner
        # iterates over makes the runner call this method again.
        self._loader = _BaseFiller(self)
        runner.register_hook(self._loader, priority='HIGHEST')
        if runner._resume and runner._load_from is None:
            self._choose(runner)

    def _folder(self, runner: Runner) -> Path:
        """Return the folder of this run's checkpoints."""
        work_dir = Path(runner.work_dir)
        return work_dir if self.out_dir in (None, runner.work_dir) else Path(self.out_dir) / work_dir.name

    def _choose(self, runner: Runner) -> None:
        """Choose the newest intact checkpoint to resume from. Without one, training starts from scratch."""
        folder = self._folder(runner)
        path, damaged = on_main_process(lambda: find_newest(folder, self._template))
        for error in damaged:
            runner.logger.warning(f'skipped in resuming: {error}')
        if path is not None:
            if damaged:
                runner.logger.warning(f'resuming from {path.name}, the newest intact checkpoint')
            runner._load_from = str(path)
        else:
            runner.logger.info(f'no checkpoint to resume from in {folder}: training starts from the beginning')
            runner._resume = False

    def complete(self, runner: Runner, checkpoint: dict) -> None:
        """Add the base weights from the model to an adapter checkpoint.

        Raises:
            DamagedFileError: The checkpoint does not have the format of this hook.
            WeightsError: The checkpoint is of another PEFT method or was trained on another base.
        """
        note = checkpoint.get(NOTE)
        if note is None:
            return  # an ordinary checkpoint
        check_note(note, runner._load_from)
        model = unwrap(runner.model)
        injection = get_injection(model)
        check_training(checkpoint, model, injection, str(runner._load_from), whole=True)
        adopt_output_norms(injection, note.get('trained') or ())
        difference = initialise_base(model, note)
        if difference is not None and self.base is not None:
            runner.logger.info(f'loading the base, {self.base}')
            self._load_base(model)
            difference = base_difference(note, base_of(model))
        if difference is not None:
            raise WeightsError(f'{runner._load_from} does not fit: {self._misfit(note, difference)}')
        if runner._resume:
            check_resumable(checkpoint, runner)
            keep_names_only(checkpoint['message_hub']['runtime_info'], self._folder(runner))
        elif note.get('measured') == 'raw' and averaged_model(runner) is None and 'ema_state_dict' in checkpoint:
            checkpoint['state_dict'] = raw_state(checkpoint)
        frozen = frozen_state(model)
        checkpoint['state_dict'].update(frozen)
        if 'ema_state_dict' in checkpoint:
            checkpoint['ema_state_dict'].update({f'module.{name}': value.clone() for name, value in frozen.items()})
        if runner._resume:
            self._resumed = note
            self._source = self.base or note['load_from']

    def _load_base(self, model: nn.Module) -> None:
        """Load the base that the user named."""
        assert self.base is not None
        if '://' in self.base:
            load_checkpoint(model, self.base, map_location='cpu')
        else:
            state = state_dict_of(read_checkpoint(self.base), self.base)
            load_state_dict(model, {n.removeprefix('module.'): v for n, v in state.items()}, strict=False)

    def _misfit(self, note: dict, difference: str) -> str:
        """Return the error message for a checkpoint of another base."""
        text = f'the checkpoint was trained on another base: {difference}. '
        if self.base is not None:
            text += f'The given base, {self.base}, does not match. '
        if note['load_from'] is not None:
            text += (
                f"Its run began with load_from='{shortened(note['load_from'])}'. A path in a file is never opened. If "
                'you trust it, name it yourself: --base FILE of tools/train.py and tools/test.py, '
                '`load_from` of the config, or `base` of the AdapterCheckpointHook'
            )
        else:
            text += (
                'Set the pre-trained weights of its run in `init_cfg` (or, for a backbone that was not pre-trained, '
                'the same `randomness.seed`)'
            )
        return text

    # Exact resumption

    def before_train_epoch(self, runner: Runner) -> None:
        """Restore the in-memory state of the interrupted run."""
        note, self._resumed = self._resumed, None
        if note is None:
            return
        if len(note['rank_states']) != get_world_size():
            runner.logger.warning(
                f'the checkpoint was written by {len(note["rank_states"])} processes, this run has {get_world_size()}: '
                'random states are not restored'
            )
            return
        state = note['rank_states'][get_rank()]
        for name, parameter in unwrap(runner.model).named_parameters():
            if name in state['gradients']:
                if state['gradients'][name].shape != parameter.shape:
                    raise DamagedFileError(f'{runner._load_from}: the gradient of {name} has another shape than {name}')
                parameter.grad = placed_like(state['gradients'][name].to(parameter.device, parameter.dtype), parameter)
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            # The loop first draws the batches that were already trained on.
            loop = runner.train_loop
            loop.dataloader_iterator = _AfterSkipping(loop.dataloader_iterator, loop.iter, state['random'])
        else:
            set_random_state(state['random'])

    def before_val(self, runner: Runner) -> None:
        """Remember the random state, which validation must not change."""
        self._before_val = random_state()

    def after_val(self, runner: Runner) -> None:
        """Restore the random state."""
        if self._before_val is not None:
            set_random_state(self._before_val)
        self._before_val = None

    # Saving

    def before_train(self, runner: Runner) -> None:
        """Prepare the folder, and remove incomplete files of killed processes."""
        super().before_train(runner)
        if not runner._resume:
            self._source = runner._load_from
        if is_main_process():
            remove_abandoned(Path(self.out_dir))

    def after_train(self, runner: Runner) -> None:
        """Log a warning if the run diverged."""
        super().after_train(runner)
        if self._diverged is not None:
            runner.logger.warning(
                f'the training diverged: {self._diverged}. The files written before are unchanged. Continue from '
                'them with a lower learning rate, or with clipped gradients'
            )

    def _save_checkpoint(self, runner: Runner) -> None:
        if self._has_diverged(runner):
            return
        with self._writing_adapters(runner):
            super()._save_checkpoint(runner)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if self.save_best and self._has_diverged(runner):
            return
        self._scores = {n: float(v) for n, v in metrics.items() if isinstance(v, (int, float)) and np.isfinite(v)}
        with self._writing_adapters(runner):
            super()._save_best_checkpoint(runner, metrics)
        self._scores = None

    def _has_diverged(self, runner: Runner) -> bool:
        """Whether the tensors to write hold NaN or infinite values. The first process decides; a warning is logged."""
        if is_sharded(unwrap(runner.model)):
            self._diverged = diverged_in(runner)  # gathers, so all processes take part
        else:
            self._diverged = on_main_process(lambda: diverged_in(runner))
        if self._diverged is not None:
            runner.logger.warning(f'no checkpoint is written: {self._diverged}')
        return self._diverged is not None

    @contextmanager
    def _writing_adapters(self, runner: Runner) -> Iterator[None]:
        """Make MMEngine save with our function within the context, and remove files at the end."""
        state = dict(random=self._before_val or random_state(), gradients=waiting_gradients(runner))
        self._rank_states = all_gather_object(state)
        self._written = []
        removal = _LateRemoval(self.file_backend, Path(self.out_dir))
        original, backend = checkpoint_module.save_checkpoint, self.file_backend
        # The first is what Runner calls, the second what strategies call.
        for module in (runner_module, checkpoint_module):
            module.save_checkpoint = lambda checkpoint, path, *args, **kwargs: self._write(runner, checkpoint, path)
        self.file_backend = removal
        strategy = getattr(runner, 'strategy', None)
        if isinstance(strategy, FullyShardStrategy):
            strategy.left_out = frozen_state(unwrap(runner.model)).keys()
        try:
            yield
        finally:
            runner_module.save_checkpoint = checkpoint_module.save_checkpoint = original
            self.file_backend = backend
            if isinstance(strategy, FullyShardStrategy):
                strategy.left_out = ()
        for path in removal.late:
            if Path(path) not in self._written:
                Path(path).unlink(missing_ok=True)

    def _write(self, runner: Runner, checkpoint: dict, path: str) -> None:
        model = unwrap(runner.model)
        if self._base is None:
            self._base = describe_base(model)
        frozen = frozen_state(model).keys()
        checkpoint = dict(checkpoint)
        state = checkpoint['state_dict']
        if is_model_wrapper(runner.model):  # MMEngine's strategies write the wrapper's names
            state = {n.removeprefix('module.'): v for n, v in state.items()}
        checkpoint['state_dict'] = {n: v for n, v in state.items() if n not in frozen}
        if 'ema_state_dict' in checkpoint:
            ema = checkpoint['ema_state_dict']
            checkpoint['ema_state_dict'] = {n: v for n, v in ema.items() if n.removeprefix('module.') not in frozen}
        injection = get_injection(model)
        assert injection is not None  # before_run raises otherwise
        checkpoint[NOTE] = dict(
            **describe_training(injection),
            **self._base,
            task=class_name(model),
            backbones=list(backbones_of(model)),
            heads=heads_of(model),
            load_from=self._source,
            rank_states=self._rank_states,
            weights='averaged' if 'ema_state_dict' in checkpoint else 'raw',
            measured='averaged' if averaged_model(runner) is not None else 'raw',
            scores=self._scores,
        )
        save_checkpoint(checkpoint, path)
        self._written.append(Path(path))


class _BaseFiller(Hook):
    """Completes loaded checkpoints before any other hook sees them."""

    def __init__(self, owner: AdapterCheckpointHook) -> None:
        self.owner = owner

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        self.owner.complete(runner, checkpoint)


class _LateRemoval:
    """A file backend that records which files of a folder to remove later."""

    def __init__(self, backend: Any, folder: Path) -> None:
        self.backend = backend
        self.folder = folder
        self.late: list[str] = []

    def remove(self, path: str) -> None:
        if Path(path).is_relative_to(self.folder) and '..' not in Path(path).parts:
            self.late.append(path)

    def rmtree(self, path: str) -> None:
        """Do nothing: no folder is a checkpoint."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


class _AfterSkipping:
    """An iterator over the batches of an iteration-based loop. It sets the random state after the skipped batches."""

    def __init__(self, iterator: Any, skip: int, state: dict) -> None:
        self.iterator = iterator
        self.skip = skip
        self.state: dict | None = state

    def __iter__(self) -> _AfterSkipping:
        return self

    def skip_iter(self, number: int) -> None:
        """Skip in the sampler, as newer releases of MMEngine do. Older ones draw the batches."""
        self.iterator.skip_iter(number)
        self.skip -= number

    def __next__(self) -> Any:
        if self.skip == 0 and self.state is not None:
            if hasattr(self.iterator, '_ensure_iterator'):
                self.iterator._ensure_iterator()  # which draws a random number
            set_random_state(self.state)
            self.state = None
        self.skip -= 1
        return next(self.iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.iterator, name)


def on_main_process(decide: Callable[[], Outcome]) -> Outcome:
    """Call a function on the first process, and return or raise its outcome on all processes.

    Args:
        decide: The function. Its ValueErrors, RuntimeErrors and OSErrors are raised on all processes.
    """
    outcome: list[Any] = [None, None]
    if is_main_process():
        try:
            outcome[0] = decide()
        except (ValueError, RuntimeError, OSError) as error:
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def newest_intact(folder: Path, template: FilenameTemplate) -> tuple[Path | None, list[DamagedFileError]]:
    """Find the most recently written checkpoint that can be read.

    The time of writing decides, not the step: an earlier run in the same folder
    may have left checkpoints of later steps.

    Args:
        folder: The folder of the checkpoints.
        template: Template of their file names.

    Returns:
        The path of the checkpoint, or None, and the errors of newer checkpoints.
    """
    found = template.find(folder)
    damaged = []
    for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, found[path]), reverse=True):
        try:
            load_safetensors(str(path))
        except DamagedFileError as error:
            damaged.append(error)
        else:
            return path, damaged
    return None, damaged


def find_newest(folder: Path, template: FilenameTemplate) -> tuple[Path | None, list[DamagedFileError]]:
    """Do what :func:`newest_intact` does, but raise an error if the folder has only unusable checkpoints.

    Args:
        folder: The folder of the checkpoints.
        template: Template of their file names.

    Returns:
        The path of the checkpoint, or None, and the errors of newer checkpoints.

    Raises:
        DamagedFileError: There are checkpoints, but none is intact.
        ValueError: No file matches the template, but there are checkpoints with other names.
    """
    path, damaged = newest_intact(folder, template)
    if path is None and damaged:
        raise DamagedFileError(
            f'none of the checkpoints in {folder} is intact; restore them from other copies, or remove them to start '
            f'again. The newest: {damaged[0]}'
        )
    others = sorted(other.name for other in folder.glob('*') if path is None and _is_other_checkpoint(other))
    if others:
        raise ValueError(
            f"no checkpoint in {folder} matches filename_tmpl '{template.template}', but there are checkpoints with "
            f'other names: {", ".join(others[:3])}{", ..." if len(others) > 3 else ""}. Name the one to '
            'resume from (--resume FILE), set filename_tmpl as it was, or remove them to start again'
        )
    return path, damaged


def _is_other_checkpoint(path: Path) -> bool:
    """Whether a file is a training checkpoint that a run can resume from. The best ones hold no optimizer."""
    if not path.is_file() or path.name.startswith(BEST):
        return False
    if path.suffix == '.pth':
        return path.stem.startswith(('epoch_', 'iter_'))
    if path.suffix != '.safetensors':
        return False
    try:
        return is_checkpoint(read_safetensors(path)[0])
    except DamagedFileError:
        return path.name.startswith(('epoch_', 'iter_'))


def keep_names_only(runtime_info: dict[str, Any], folder: Path) -> None:
    """Restrict the paths in a checkpoint to files of this run, so that MMEngine finds and removes no others.

    Args:
        runtime_info: State of the message hub in the checkpoint, changed in place.
        folder: The folder of this run's checkpoints.
    """
    for key in [key for key in runtime_info if key.startswith(('best_ckpt', 'best_score', 'last_ckpt', 'keep_ckpt'))]:
        value = runtime_info.pop(key)
        if key.startswith('best_score'):
            proper = isinstance(value, (int, float)) and not isinstance(value, bool)
        elif key == 'keep_ckpt_ids':
            proper = isinstance(value, list) and all(type(step) is int for step in value)
        else:
            name = Path(value).name if isinstance(value, str) and '\0' not in value else ''
            proper = name.endswith('.safetensors') and (name.startswith(BEST) or key == 'last_ckpt')
            value = str(folder / name)
        if proper:
            runtime_info[key] = value


def averaged_model(runner: Runner) -> nn.Module | None:
    """Return the copy of the model with averaged weights (EMA) that validation measures, or None."""
    for hook in runner.hooks:
        # MMPretrain's EMAHook can evaluate the model itself instead.
        if isinstance(hook, EMAHook) and getattr(hook, 'evaluate_on_ema', True) and hasattr(hook, 'ema_model'):
            return hook.ema_model.module
    return None


def diverged_in(runner: Runner) -> str | None:
    """Describe NaN and infinite values in a run's trained tensors and their averages; None if there are none."""
    for model in (unwrap(runner.model), averaged_model(runner)):
        if model is not None:
            frozen = frozen_state(model).keys()
            names = find_diverged(wholes({n: v for n, v in model.state_dict().items() if n not in frozen}))
            if names:
                return f'by iteration {runner.iter} {diverged_error(names)}'
    return None


def waiting_gradients(runner: Runner) -> dict[str, torch.Tensor]:
    """Return the gradients of an incomplete accumulation, by parameter name."""
    if getattr(runner.optim_wrapper, '_accumulative_counts', 1) == 1:
        return {}
    named = unwrap(runner.model).named_parameters()
    return {name: whole(p.grad.detach()).cpu() for name, p in named if p.grad is not None}


def random_state() -> dict[str, Any]:
    """Return the states of all random generators of this process."""
    state = dict(python=random.getstate(), numpy=np.random.get_state(), torch=torch.get_rng_state())
    if torch.cuda.is_available():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'].cpu())
