"""The peak of a process that allocates what the test knows."""

import numpy as np
import pytest
import torch
from mmengine.hooks import LoggerHook
from mmengine.runner import get_priority

from iconformer_mm.comparison import peak_memory
from iconformer_mm.comparison.peak_memory import PeakMemoryHook

MIB = 2**20
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='the memory of a GPU holds tensors alone')


def use(mib):
    """Hold so much memory for a moment."""
    np.ones(mib * MIB, dtype=np.uint8).sum()


def resident():
    peak_memory.forget_peak()
    return peak_memory.read_peak() / MIB


def test_steps_count_and_nothing_else():
    hook, before = PeakMemoryHook(), resident()
    use(900)  # loading
    hook.before_train(None)
    for mib in (100, 300):
        hook.before_train_iter(None, 0)
        use(mib)
    hook.before_val(None)
    use(600)
    hook.after_val(None)
    hook.before_train_iter(None, 0)
    use(200)
    hook.before_val(None)
    use(600)
    hook.after_val(None)
    use(600)
    assert hook.peak() / MIB == pytest.approx(before + 300, abs=50)


def test_steps_before_a_divergence_count():
    hook, before = PeakMemoryHook(), resident()
    hook.before_train(None)
    hook.before_train_iter(None, 0)
    use(300)
    assert hook.peak() / MIB == pytest.approx(before + 300, abs=50)


def test_another_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, 'PROCESS', tmp_path / 'none')
    hook = PeakMemoryHook()
    hook.before_train(None)
    hook.before_train_iter(None, 0)
    hook.before_val(None)
    assert hook.peak() is None


def test_a_logger_that_forgets_the_peak():
    """As MMEngine's does on CUDA, after each line of the log."""
    hook, before = PeakMemoryHook(), resident()
    for mib in (300, 100):
        hook.before_train_iter(None, 0)
        use(mib)
        hook.after_train_iter(None, 0)
        peak_memory.forget_peak()
    assert hook.peak() / MIB == pytest.approx(before + 300, abs=50)


def test_it_is_read_before_the_logger():
    assert get_priority(PeakMemoryHook.priority) < get_priority(LoggerHook.priority)
