"""The peak memory of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

PROCESS = Path('/proc/self')  # Linux


def forget_peak() -> bool:
    """Have the peak counted from now on.

    Returns:
        Whether it can be. Beside CUDA it can be on Linux.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        (PROCESS / 'clear_refs').write_text('5', encoding='ascii')
    except OSError:
        return False
    return True


def read_peak() -> int:
    """The peak since :func:`forget_peak`, in bytes.

    With CUDA it is the memory of all tensors on the current GPU. Otherwise it is the resident memory of this process,
    with its libraries.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = (PROCESS / 'status').read_text(encoding='ascii').splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('VmHWM'))


class PeakMemoryHook(Hook):
    """Notes the peak memory of the training steps. Loading before them and validations do not count.

    The peak is read after each step, before MMEngine's logger, which has CUDA forget it with every line of the log.
    """

    def __init__(self) -> None:
        self._largest: int | None = None
        self._counts = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Begin to count at the first step, and at the first one after a validation."""
        if not self._counts:
            self._counts = forget_peak()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Note the peak."""
        self._note()

    def before_val(self, runner: Runner) -> None:
        """Note the peak of the steps up to a validation."""
        self._note()

    def after_val(self, runner: Runner) -> None:
        """Leave the validation out."""
        self._counts = False

    def peak(self) -> int | None:
        """The peak of all steps in bytes; None where the system does not tell."""
        self._note()
        return self._largest

    def _note(self) -> None:
        if self._counts:
            self._largest = max(self._largest or 0, read_peak())
