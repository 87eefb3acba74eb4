"""Runs are read from work directories, whole, resumed and damaged ones."""

import json
from dataclasses import asdict

import cv2
import numpy as np
import pytest
from small_classifiers import classifier  # noqa: E402

from iconformer_mm import inject, save_adapter, summarize  # noqa: E402
from iconformer_mm.files import write_json  # noqa: E402
from iconformer_mm.reports.report_page import ReportError  # noqa: E402
from iconformer_mm.reports.run_report import best_of, read_environment, read_run, read_summary, report_run  # noqa: E402

MIB = 2**20
ENVIRONMENT = """2026/01/01 10:00:00 - mmengine - INFO -
------------------------------------------------------------
System environment:
    sys.platform: linux
    Python: 3.11.7 (main: x) [GCC 12.2.0]
    PyTorch: 2.12.1
    PyTorch compiling details: PyTorch built with:
  - GCC 13.3
  - Build settings: A=b

    MMEngine: 0.10.12

Runtime environment:
    seed: 0
------------------------------------------------------------
2026/01/01 10:00:01 - mmengine - INFO - Config: x
"""


def write_start(folder, train, val=(), tail='', config='a = 1', log=ENVIRONMENT):
    """What MMEngine leaves of a start: steps as (epoch, iteration, loss), validations as (epoch, accuracy)."""
    (folder / 'vis_data').mkdir(parents=True)
    lines = [dict(lr=0.1, loss=loss, time=0.5, epoch=epoch, iter=step, step=step) for epoch, step, loss in train]
    lines += [{'accuracy/top1': value, 'time': 0.1, 'step': epoch} for epoch, value in val]
    text = ''.join(json.dumps(line) + '\n' for line in lines) + tail
    if text:
        (folder / 'vis_data' / 'scalars.json').write_text(text)
    (folder / 'vis_data' / 'config.py').write_text(config)
    (folder / f'{folder.name}.log').write_text(log)


def sections(page):
    return {section.title: section for section in page.sections}


def test_a_resumed_run_is_one_run(tmp_path):
    """Killed in epoch 3 after a validation at epoch 2; resumed from epoch 1: what was done twice counts once."""
    write_start(tmp_path / '20260101_100000', [(1, 4, 9.0), (2, 8, 8.0), (3, 12, 7.0)], [(1, 10.0), (2, 20.0)])
    write_start(tmp_path / '20260101_110000', [(2, 8, 8.5), (3, 12, 7.5)], [(2, 21.0), (3, 30.0)], config='b = 2')
    write_start(tmp_path / '20260101_120000', [], log='no environment')  # resumed at its end
    run = read_run(tmp_path)
    assert [record['loss'] for record in run.train] == [9.0, 8.5, 7.5]
    assert [record['accuracy/top1'] for record in run.val] == [10.0, 21.0, 30.0]
    assert not run.problems and run.unit == 'epoch'
    facts = sections(report_run(tmp_path, MIB))['Summary'].facts
    assert facts['starts'] == '3: 20260101_100000, 20260101_110000, 20260101_120000'
    assert facts['trained until'] == 'iteration 12, epoch 3'


def test_a_run_that_began_anew_replaces_the_first(tmp_path):
    write_start(tmp_path / '20260101_100000', [(1, 4, 9.0), (2, 8, 8.0)], [(1, 10.0), (2, 20.0)])
    write_start(tmp_path / '20260101_110000', [(1, 4, 5.0)])
    run = read_run(tmp_path)
    assert [record['loss'] for record in run.train] == [5.0] and run.val == []


def test_damaged_lines_are_left_out_and_named(tmp_path):
    write_start(tmp_path / '20260101_100000', [(1, 4, 9.0)], tail='[1]\n{"no step": 1}\n{"lr": 0.1, "loss": 2.3, "st')
    section = sections(report_run(tmp_path, MIB))['Summary']
    assert section.notes[0] == (
        'damaged lines left out of 20260101_100000/vis_data/scalars.json: 3, the first is line 2'
    )
    assert section.facts['trained until'] == 'iteration 4, epoch 1'


def test_a_start_with_nothing_yet(tmp_path):
    (tmp_path / '20260101_100000').mkdir()
    (tmp_path / 'adapter.safetensors').write_bytes(b'\x08' * 100)
    found = sections(report_run(tmp_path, MIB))
    for title, words in {
        'Summary': 'no PEFTHook adapted the model',
        'Curves': 'nothing was logged yet',
        'Metrics': 'no validation was logged',
        'Predictions': 'no pictures were found',
        'Adapter': 'not a valid safetensors file',
        'Environment': 'no log with an environment',
        'Config': 'no config was found',
    }.items():
        (note,) = found[title].notes
        assert words in note


def test_another_folder_is_an_error(tmp_path):
    with pytest.raises(ReportError, match='is neither a work directory of tools/train.py'):
        read_run(tmp_path)


@pytest.mark.parametrize('method', ['icon', 'lora', 'full'])
def test_the_summary_is_read_as_it_was_written(method, tmp_path):
    model = classifier()
    inject(model, method)
    summary = summarize(model)
    write_json(tmp_path / 'peft_summary.json', asdict(summary))
    problems = []
    read = read_summary(tmp_path, problems)
    assert str(read) == str(summary) and read.method == method and not problems
    assert read.rows['whole model'] == (summary.trainable, summary.frozen, summary.trainable + summary.frozen)
    write_start(tmp_path / '20260101_100000', [])
    page = report_run(tmp_path, 0)
    assert page.sections[0].facts['method'] == method
    assert page.sections[0].facts['adapted modules'] == summary.adapted


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('{"method": ', 'JSONDecodeError'),
        ('[]', 'TypeError'),
        ('{"method": "icon"}', "KeyError: 'trainable'"),
        (None, 'there is no peft_summary.json: no PEFTHook'),
    ],
)
def test_a_damaged_summary_is_named(content, words, tmp_path):
    write_start(tmp_path / '20260101_100000', [])
    if content is not None:
        (tmp_path / 'peft_summary.json').write_text(content)
    section = report_run(tmp_path, 0).sections[0]
    assert any(words in note for note in section.notes) and 'method' not in section.facts


def test_a_summary_with_a_value_of_another_kind_is_named(tmp_path):
    content = asdict(summarize(classifier()))
    for key, value in dict(parts=[1], backbone_share='much', sites=dict(ViT=3), trainable=None).items():
        write_json(tmp_path / 'peft_summary.json', {**content, key: value})
        problems = []
        assert read_summary(tmp_path, problems) is None and 'peft_summary.json cannot be read' in problems[0]


def test_the_environment_is_read_without_compiler_flags():
    assert read_environment(ENVIRONMENT) == {
        'sys.platform': 'linux',
        'Python': '3.11.7 (main: x) [GCC 12.2.0]',
        'PyTorch': '2.12.1',
        'MMEngine': '0.10.12',
        'seed': '0',
    }


@pytest.mark.parametrize(
    ('name', 'step'),
    [
        ('accuracy/top1', 2),
        ('mIoU', 2),
        ('coco/segm_mAP', 2),
        ('d1', 2),
        ('single-label/f1-score', 2),
        ('rmse', 1),
        ('abs_rel', 1),
        ('loss', 1),
        ('mystery', None),
    ],
)
def test_best_is_highest_or_lowest_or_unknown(name, step):
    records = [{name: 1.0, 'step': 1}, {name: 3.0, 'step': 2}, {name: float('nan'), 'step': 3}, {'step': 4}]
    best = best_of(name, records)
    assert (best and best['step']) == step


def picture(path, shape=(30, 40, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))


def test_pictures_have_captions_and_a_limit(tmp_path):
    write_start(tmp_path / '20260101_100000', [(1, 4, 9.0)])
    for name in ('a', 'a_labels', 'b', 'c', 'd'):
        picture(tmp_path / 'predictions' / f'{name}.png')
    picture(tmp_path / '20260101_100000' / 'vis_data' / 'vis_image' / 'val_0.png')
    damaged = tmp_path / 'predictions' / 'e.png'
    damaged.write_bytes((tmp_path / 'predictions' / 'a.png').read_bytes()[:1000])
    described = {
        'x/a.jpg': dict(area=dict(sky=0.75, tree=0.25)),
        'x/b.jpg': dict(depth_m=dict(min=1.0, median=2.0, max=3.5)),
        'x/c.jpg': dict(instances=[{}, {}]),
        'x/d.jpg': dict(label=3, name='<cat>', score=0.5),
    }
    (tmp_path / 'predictions' / 'predictions.json').write_text(json.dumps(dict(predictions=described)))
    section = sections(report_run(tmp_path, MIB))['Predictions']
    assert [p.caption for p in section.pictures] == [
        'predictions/a.png: sky 75%, tree 25%',
        'predictions/b.png: depth 1.00 to 3.50 m',
        'predictions/c.png: 2 instances',
        'predictions/d.png: <cat> (0.50)',
        '20260101_100000/vis_data/vis_image/val_0.png',
    ]
    assert section.notes == ['pictures that cannot be read: 1, such as predictions/e.png']

    size = (tmp_path / 'predictions' / 'a.png').stat().st_size
    section = sections(report_run(tmp_path, int(2.5 * size)))['Predictions']
    assert len(section.pictures) == 2 and section.notes[0].endswith('at most 48): 3 of 6')

    (tmp_path / 'predictions' / 'predictions.json').write_text('{"predictions": {"a": ')
    section = sections(report_run(tmp_path, MIB))['Predictions']
    assert section.notes[0].startswith('predictions.json cannot be read') and len(section.pictures) == 5


def test_the_adapter_file(tmp_path):
    write_start(tmp_path / '20260101_100000', [(1, 4, 9.0)])
    model = classifier(10)
    inject(model, 'icon', bottleneck=8)
    save_adapter(model, tmp_path / 'adapter.safetensors', task='birds', classes=[f'c{i}' for i in range(20)])
    facts = sections(report_run(tmp_path, MIB))['Adapter'].facts
    head = sum(v.numel() for n, v in model.state_dict().items() if not n.startswith('backbone.'))
    assert facts['holds'] == f'{summarize(model).adapters:,} parameters of adapters, {head:,} values of neck and head'
    assert '"bottleneck": 8' in facts['method'] and facts['task'] == 'birds'
    assert facts['classes'].startswith('20: c0, c1') and facts['classes'].endswith('c11, ...')
