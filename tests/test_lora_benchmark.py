"""The comparison of LoRA implementations, on a small ViT; no time is asserted."""

import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'benchmarks'))
import lora  # noqa: E402

pytest.importorskip('mmpretrain', reason='LoRAModel is in MMPretrain, which is not installed')
OURS, THEIRS = 'iconformer_mm on MMPretrain', 'LoRAModel on MMPretrain'


def test_rows(monkeypatch, tmp_path, capsys):
    """Both train the same number of parameters, and compute the same from one file."""
    monkeypatch.setattr(lora, 'measure_peaks', lambda args, names, progress: dict.fromkeys(names, 1.0))
    options = ['--width', 'small', '--rounds', '1', '--batch', '1', '--out', str(tmp_path), '--cases']
    monkeypatch.setattr(sys, 'argv', ['program', *options, OURS, THEIRS, 'peft on timm'])
    monkeypatch.setattr(lora, 'find_spec', lambda name: None if name == 'peft' else True)
    lora.main()
    assert 'peft on timm: left out, since peft is not installed' in capsys.readouterr().out
    rows = {row['contestant']: row for row in json.loads((tmp_path / 'results.json').read_text())['LoRA']}
    assert set(rows) == {'full fine-tuning of MMPretrain', OURS, THEIRS}
    width, hidden, blocks = 192, 768, 2
    expected = blocks * lora.RANK * (2 * width + 2 * (width + hidden))  # o, fc1 and fc2
    assert rows[OURS]['trained'] == rows[THEIRS]['trained'] == expected
    assert rows[THEIRS]['difference'] <= lora.TOLERANCE
    for name in (OURS, THEIRS):
        assert rows[name]['file (kB)'] > expected * 4 / 1000 and rows[name]['load (ms)'] > 0


def test_other_outputs_stop_it(monkeypatch, tmp_path):
    monkeypatch.setattr(lora, 'ALPHA', 16)
    real = lora.inject_foreign

    def wrong(model, foreign):
        real(model, foreign)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).add_(1)

    monkeypatch.setattr(lora, 'inject_foreign', wrong)
    with pytest.raises(SystemExit, match='LoRAModel on MMPretrain: outputs differ by'):
        lora.check_equal('small', [THEIRS], tmp_path)
