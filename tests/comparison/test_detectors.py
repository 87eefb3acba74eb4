"""Comparisons of methods that adapt more than the backbone."""

import json
import uuid
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from rich.console import Console
from safetensors.torch import load_file, save_file
from small_detectors import DINO, build

from iconformer_mm import inject, summarize
from iconformer_mm.comparison.intervals import reference_of
from iconformer_mm.comparison.results import Results
from iconformer_mm.comparison.single_run import check_frozen_weights, keep_predictions, make_config, train
from iconformer_mm.comparison.spec import ComparisonError, load_comparison
from iconformer_mm.comparison.tables import make_rows, report, table, tradeoff_panels
from iconformer_mm.datasets.scenes import WRITERS, scenes
from iconformer_mm.engine import build_runner

YAML = ROOT / 'configs' / 'comparison' / 'detectors.yaml'
TOWERS = ('backbone', 'encoder', 'decoder')
METHODS = [dict(where='backbone', type='icon', bottleneck=4), dict(where=['encoder', 'decoder'], type='lora', rank=2)]


def run_of(method):
    comparison = load_comparison(YAML)
    (task,) = comparison.tasks.values()
    return comparison.runs(task, comparison.methods[method], 1e-3)[0]


def test_settings_name_the_methods():
    """A run is made again if one of them changes. The settings of single methods are as before."""
    settings = run_of('icon_lora').settings
    assert [entry['type'] for entry in settings['methods']] == ['icon', 'lora'] and 'method' not in settings
    assert run_of('full').settings['method'] == dict(type='full') and 'methods' not in run_of('full').settings


@pytest.mark.parametrize(
    'value',
    [
        dict(where='encoder', type='lora'),
        [],
        ['lora'],
        [dict(type='icon')],
        [dict(where='backbone', type='icon'), dict(where='encoder', rank=4)],
    ],
    ids=['no list', 'empty', 'a name', 'no where', 'no type'],
)
def test_methods_without_their_place_or_type(value, tmp_path):
    content = yaml.safe_load(YAML.read_text())
    content['tasks']['boxes'].update(config=str(YAML), base=str(YAML))  # files that exist
    content['methods']['lora']['methods'] = value
    (tmp_path / 'c.yaml').write_text(yaml.safe_dump(content))
    with pytest.raises(ComparisonError, match='methods.lora.methods must be a list of methods with where and type'):
        load_comparison(tmp_path / 'c.yaml')


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp('base') / 'base.safetensors'
    save_file(build(DINO).state_dict(), path)
    return path


def adapted(base, methods=METHODS):
    model = build(DINO, seed=1)
    model.load_state_dict(load_file(base))
    inject(model, methods=methods)
    return model


@pytest.mark.parametrize('tower', TOWERS)
def test_every_adapted_module_is_compared_with_the_base(tower, base):
    model = adapted(base)
    assert check_frozen_weights(model, base)
    name, parameter = next((n, p) for n, p in model.get_submodule(tower).named_parameters() if not p.requires_grad)
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-3
    with pytest.raises(RuntimeError, match=f'the frozen tensor {tower}.{name} changed in training'):
        check_frozen_weights(model, base)


def test_a_module_alone_is_compared_too(base):
    model = adapted(base, [dict(where='encoder', type='lora')])
    with torch.no_grad():
        next(model.decoder.parameters()).add_(1)  # it is trained
    assert check_frozen_weights(model, base)
    with torch.no_grad():
        next(p for p in model.encoder.parameters() if not p.requires_grad).add_(1)
    with pytest.raises(RuntimeError, match='the frozen tensor encoder'):
        check_frozen_weights(model, base)


def test_a_base_without_one_of_the_modules(base, tmp_path):
    content = {name: value for name, value in load_file(base).items() if not name.startswith('encoder.')}
    save_file(content, tmp_path / 'part.safetensors')
    with pytest.raises(RuntimeError, match='lacks encoder.* which is frozen: it is not the base of this model'):
        check_frozen_weights(adapted(base), tmp_path / 'part.safetensors')


@pytest.mark.filterwarnings('ignore')
def test_a_run_trains_and_validates(tmp_path):
    """Two iterations of the comparison's own config and base, on four scenes."""
    for split in ('train', 'val'):
        WRITERS['coco'](tmp_path / 'coco', split, scenes(4, 0, 'target'))
    run = run_of('icon_lora')
    settings = deepcopy(run.settings)
    settings['options'] = {
        'train_cfg.max_iters': 2,
        'train_cfg.val_interval': 2,
        'train_dataloader.batch_size': 2,
        'train_dataloader.dataset.data_root': f'{tmp_path}/coco/',
        'val_dataloader.dataset.data_root': f'{tmp_path}/coco/',
        'test_dataloader.dataset.data_root': f'{tmp_path}/coco/',
        'val_evaluator.ann_file': f'{tmp_path}/coco/annotations/instances_val2017.json',
        'test_evaluator.ann_file': f'{tmp_path}/coco/annotations/instances_val2017.json',
        'log_level': 'WARNING',
        'experiment_name': uuid.uuid4().hex,
    }
    runner = build_runner(make_config(settings, run.task.base_file(), tmp_path / 'work'))
    score = train(runner, run.task.metric)
    assert 0.02 < score <= 1  # the base knows the shapes, in other colours
    towers = summarize(runner.model).towers
    assert [towers[path].method for path in TOWERS] == ['icon', 'lora', 'lora']
    assert check_frozen_weights(runner.model, run.task.base_file())
    rates = sorted({group['initial_lr'] for group in runner.optim_wrapper.optimizer.param_groups})
    assert rates == pytest.approx([1e-3, 1e-2])  # of the head, and of adapters
    keep_predictions(runner, [1, 3], tmp_path / 'pictures.npz')
    pictures = np.load(tmp_path / 'pictures.npz')
    assert pictures['truth'].shape == pictures['predicted'].shape == (2, 96, 128, 3)
    assert (pictures['truth'] != pictures['predicted']).any()


def finish(results, run, score, share):
    """Write a run as a run would."""
    path = results.file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = dict(trained_parameters=int(1e6 * share) + 100, trained_backbone=int(1e6 * share), backbone_share=share)
    content = dict(settings=run.settings, score=score, curve=[[1, 1.0]], train_seconds=2.0, **counts)
    path.write_text(json.dumps(content))


def test_a_report_counts_all_adapted_modules(tmp_path):
    """Its titles say so. Where a method is a list, none of its entries is taken for iCoN or full fine-tuning."""
    comparison = load_comparison(YAML)
    results = Results(comparison, tmp_path)
    (task,) = comparison.tasks.values()
    for name, share in (('icon_lora', 0.07), ('full', 1.0)):
        method = comparison.methods[name]
        for run in comparison.searches(task, method):
            finish(results, run, 0.2, share)
        for run in comparison.runs(task, method, min(comparison.rates(task, method))):
            finish(results, run, 0.25, share)
    results.refresh()
    titles, lines = table(results, make_rows(results), '{}')
    assert titles[2] == 'adapted modules: share' and [line[2] for line in lines] == ['-', '-', '7.00%', '100.00%']
    (panel,) = tradeoff_panels(results, make_rows(results))
    assert panel.where == 'adapted modules' and set(panel.points) == {lines[2][0], 'full fine-tuning'}
    assert reference_of(comparison).name == 'icon_lora'
    assert reference_of(replace(comparison, reference=None)).name == 'frozen'  # no entry of a list is iCoN's
    report(results, tmp_path, Console(quiet=True))
    assert '| full fine-tuning |' in (tmp_path / 'table.md').read_text()
