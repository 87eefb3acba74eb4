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
    """Notes the peak memory of the training steps. Loading before them and validations do not count."""

    priority = 'VERY_LOW'  # after hooks that prepare the training

    def __init__(self) -> None:
        self._largest: int | None = None
        self._counts = False
        self._stepped = False  # since the count began

    def before_train(self, runner: Runner) -> None:
        """Begin to count."""
        self._counts = forget_peak()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Note that there is a step."""
        self._stepped = True

    def before_val(self, runner: Runner) -> None:
        """Note the peak of the steps up to a validation."""
        self._note()

    def after_val(self, runner: Runner) -> None:
        """Count on."""
        self._counts, self._stepped = forget_peak(), False

    def peak(self) -> int | None:
        """The peak of all steps in bytes; None where the system does not tell."""
        self._note()
        return self._largest

    def _note(self) -> None:
        if self._counts and self._stepped:
            self._largest = max(self._largest or 0, read_peak())
            self._stepped = False
