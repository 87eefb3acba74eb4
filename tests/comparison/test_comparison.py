"""Comparisons: the YAML file, runs that are resumed, and what is reported of them."""

import csv
import json
import shutil
import statistics
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from commands import tool
from conftest import ROOT
from rich.console import Console

from iconformer_mm.cli.compare import main, take_seeds
from iconformer_mm.comparison.results import Results, result_files
from iconformer_mm.comparison.spec import ComparisonError, load_comparison
from iconformer_mm.comparison.tables import make_rows, report, search_text, table
from iconformer_mm.engine import load_config
from iconformer_mm.tuning import build_method

CONFIGS = ROOT / 'configs' / 'quickstart'
DIGITS = dict(
    config=str(CONFIGS / 'vit-quickstart_full_digits.py'),
    base=str(CONFIGS / 'vit-quickstart_strokes.safetensors'),
    metric='accuracy/top1',
    title='digits (%)',
    learning_rates=[3e-3, 1e30],
    options={'train_cfg.max_epochs': 1, 'param_scheduler': None, 'val_dataloader.dataset.indices': 100},
)
COMPARISON = dict(
    title='Tiny',
    seeds=[0],
    search_seed=100,
    tasks=dict(digits=DIGITS),
    methods=dict(
        full=dict(title='full fine-tuning', method=dict(type='full')),
        icon=dict(title='iCoN', method=dict(type='icon', bottleneck=4)),
    ),
)


def write(path, content):
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def files(out):
    return {f'{name}.json': path.stat().st_mtime_ns for name, path in result_files(out).items()}


def test_runs_are_resumed(tmp_path, capsys):
    """A crash stops no other run, what is finished stays, and what has other settings runs again."""
    content = deepcopy(COMPARISON)
    stopping = [
        dict(type='EarlyStoppingHook', monitor='nothing', rule='less', strict=True)
    ]  # fails after the validation
    content['methods']['broken'] = dict(title='broken', method=dict(type='icon'), options=dict(custom_hooks=stopping))
    path, out = write(tmp_path / 'c.yaml', content), tmp_path / 'out'
    output = tool('compare.py', path, '--out', out, '--jobs', 2, ok=False)
    assert 'Early stopping conditioned on metric' in output
    assert '1 run failed: digits/broken/search_lr0.003' in output
    assert '2 runs are left' in output
    first = files(out)
    names = ('search_lr0.003', 'search_lr1e+30', 'seed0')
    assert set(first) == {
        'digits/broken/search_lr1e+30.json',  # it diverged before
        *(f'digits/{method}/{name}.json' for method in ('full', 'icon') for name in names),
    }
    work_dirs = {path.relative_to(out / 'runs').as_posix() for path in (out / 'runs').glob('*/*/*') if path.is_dir()}
    assert work_dirs == {'digits/broken/search_lr0.003'}  # the others are removed

    for method in ('full', 'icon'):
        diverged, run = (json.loads((out / f'runs/digits/{method}/{name}.json').read_text()) for name in names[1:])
        assert diverged['score'] is None and diverged['settings']['learning_rate'] == 1e30
        assert run['settings']['learning_rate'] == 3e-3 and run['settings']['seed'] == 0
        assert run['settings']['config'] == 'configs/quickstart/vit-quickstart_full_digits.py'
        assert 10 < run['score'] <= 100 and run['train_seconds'] > 0
        assert [step for step, _ in run['curve']] == [1, 2, 3, 4] and 1 < run['curve'][0][1] < 5
        assert run['frozen_weights_checked'] == (method == 'icon')
        assert set(run['versions']) == {'torch', 'mmengine', 'iconformer_mm'}
        with open(out / 'results.csv') as file:
            (row,) = [row for row in csv.DictReader(file) if row['method'] == method]
        assert float(row['mean']) == run['score'] and row['std'] == '' and row['seeds'] == '1'
        assert float(row['learning_rate']) == 3e-3 and float(row['peak_memory']) == run['peak_memory'] > 1e8
        assert int(row['trained_parameters']) == run['trained_parameters']
    # iCoN of bottleneck 4 in 4 blocks of width 96, and the head. The head reads the class token, so that the
    # filter of the last block is not trained.
    adapters = 4 * (2 * 96 * 4 + 4 + 96) + 3 * (4 * 9 * 4 + 2 * 9 * 4)
    assert (run['trained_backbone'], run['trained_parameters']) == (adapters, adapters + 970)

    content['methods']['icon']['method']['bottleneck'] = 8
    del content['methods']['broken']
    output = tool('compare.py', write(path, content), '--out', out, '--jobs', 2)
    assert 'digits/icon/search_lr0.003 was finished with another method' in output
    second = files(out)
    assert second.keys() == first.keys()
    assert {name for name in first if second[name] != first[name]} == {name for name in first if 'icon' in name}

    main([str(path), '--out', str(out)])
    output = capsys.readouterr().out
    assert files(out) == second and 'another' not in output and 'left' not in output


def finish(results, run, score, share=0.05, steps=3):
    """Write a run as a run would."""
    path = results.file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = dict(trained_parameters=int(1e6 * share) + 100, trained_backbone=int(1e6 * share), backbone_share=share)
    curve = [[step, 1 / step] for step in range(1, steps + 1)]
    content = dict(settings=run.settings, score=score, curve=curve, train_seconds=2.0, **counts)
    path.write_text(json.dumps(content))
    results.refresh()


def make_results(tmp_path, methods=('full', 'frozen', 'icon'), **changes):
    content = deepcopy(COMPARISON)
    content['seeds'] = [0, 1]
    content['tasks'] = dict(
        up=dict(DIGITS, title='up (%)', learning_rates=[1e-3, 3e-3, 1e-2], factor=100),
        down=dict(DIGITS, title='down (m)', learning_rates=[1e-2, 3e-2], higher_is_better=False, digits=3),
    )
    content['methods'] = {name: dict(title=name, method=dict(type=name)) for name in methods}
    content['methods']['icon']['tasks'] = ['up']
    return Results(load_comparison(write(tmp_path / 'c.yaml', content)), tmp_path)


def finish_pair(results, task, method, searched, scores, share=0.05):
    task, method = results.comparison.tasks[task], results.comparison.methods[method]
    for run, score in zip(results.comparison.searches(task, method), searched):
        finish(results, run, score, share)
    for run, score in zip([run for run in results.known(task, method) if not run.search], scores):
        finish(results, run, score, share)


def test_the_search_comes_first_and_of_equal_rates_the_smaller_is_taken(tmp_path):
    results = make_results(tmp_path)
    names = [run.name for run in results.ready(['up'], ['icon'])]
    assert names == ['up/icon/search_lr0.001', 'up/icon/search_lr0.003', 'up/icon/search_lr0.01']
    assert results.left(['up'], ['icon']) == 5
    finish_pair(results, 'up', 'icon', [0.5, 0.7, 0.7], [])
    ready = results.ready(['up'], ['icon'])
    assert [(run.name, run.learning_rate) for run in ready] == [('up/icon/seed0', 3e-3), ('up/icon/seed1', 3e-3)]
    # Of errors the smaller is better; where all rates diverge, nothing is run.
    finish_pair(results, 'up', 'full', [None, None, None], [])
    assert results.ready(['up'], ['full']) == [] and results.left(['up'], ['full']) == 0
    ready = [run.name for run in results.ready(['down'], ['full', 'icon'])]
    assert ready == ['down/full/search_lr0.01', 'down/full/search_lr0.03']


def test_a_single_rate_is_not_searched(tmp_path):
    content = deepcopy(COMPARISON)
    content['tasks']['digits']['learning_rates'] = [1e-2]
    results = Results(load_comparison(write(tmp_path / 'c.yaml', content)), tmp_path)
    runs = results.ready(['digits'], ['icon'])
    assert [(run.name, run.learning_rate) for run in runs] == [('digits/icon/seed0', 1e-2)]
    finish(results, runs[0], 50.0)
    assert make_rows(results)['digits', 'icon'].mean == 50 and results.left(['digits'], ['icon']) == 0


def test_a_method_has_rates_of_its_own(tmp_path):
    content = deepcopy(COMPARISON)
    content['tasks']['digits']['learning_rates'] = [1e-2]
    content['methods']['icon']['learning_rates'] = dict(digits=[1e-3, 3e-3])
    results = Results(load_comparison(write(tmp_path / 'c.yaml', content)), tmp_path)
    names = [run.name for run in results.ready(['digits'], ['full', 'icon'])]
    assert names == ['digits/full/seed0', 'digits/icon/search_lr0.001', 'digits/icon/search_lr0.003']
    finish_pair(results, 'digits', 'icon', [30.0, 40.0], [50.0])
    finish_pair(results, 'digits', 'full', [], [60.0])
    rows = make_rows(results)
    assert rows['digits', 'icon'].learning_rate == 3e-3 and rows['digits', 'full'].learning_rate == 1e-2
    assert '| iCoN | 30.0 | **40.0** |' in search_text(results) and '| full fine-tuning | - | - |' in search_text(
        results
    )


def test_a_search_over_several_seeds(tmp_path):
    """The rate with the best mean is taken. The first seed's files keep their names."""
    content = deepcopy(COMPARISON)
    content['search_seed'] = [100, 101]
    content['tasks']['digits']['learning_rates'] = [1e-3, 3e-3]
    results = Results(load_comparison(write(tmp_path / 'c.yaml', content)), tmp_path)
    pair = results.comparison.tasks['digits'], results.comparison.methods['icon']
    searches = results.comparison.searches(*pair)
    names = ('search_lr0.001', 'search_lr0.001_seed101', 'search_lr0.003', 'search_lr0.003_seed101')
    assert [run.name for run in searches] == [f'digits/icon/{name}' for name in names]
    assert [run.settings['seed'] for run in searches] == [100, 101, 100, 101]
    for run, score in zip(searches, (60.0, 20.0, 50.0, 45.0)):
        finish(results, run, score)
    assert results.best_rate(*pair) == 3e-3  # the single best run was at the other
    text = search_text(results)
    assert '| iCoN | 40.0 | **47.5** |' in text and 'Means over the seeds 100, 101,' in text
    finish(results, searches[3], None)
    again = Results(results.comparison, tmp_path)
    assert again.best_rate(*pair) == 1e-3 and '| iCoN | **40.0** | diverged |' in search_text(again)


def test_a_best_rate_at_the_edge_is_named(tmp_path):
    """The search of that method may have ended too early, which makes the comparison unfair."""
    content = deepcopy(COMPARISON)
    content['tasks']['digits']['learning_rates'] = [1e-3, 3e-3, 1e-2]
    results = Results(load_comparison(write(tmp_path / 'c.yaml', content)), tmp_path)
    finish_pair(results, 'digits', 'icon', [30.0, 40.0, 50.0], [])
    finish_pair(results, 'digits', 'full', [30.0, 40.0], [])
    edge = 'at the edge of its rates, and perhaps better beyond: '
    assert f'{edge}iCoN (0.01).' in search_text(results)  # the other search is unfinished
    finish_pair(results, 'digits', 'full', [30.0, 40.0, None], [])  # beyond the best, it diverges
    assert f'{edge}iCoN (0.01).' in search_text(results)
    finish_pair(results, 'digits', 'icon', [30.0, 40.0, 40.0], [])
    assert edge not in search_text(Results(results.comparison, tmp_path))


def test_rates_are_carried_over_from_another_task(tmp_path):
    """Held-out tasks are run with what was found on development tasks, and nothing is searched on them.

    Who asks for a held-out task alone gets the search, too: without it the task could never be run.
    """
    content = deepcopy(COMPARISON)
    content['tasks']['digits']['learning_rates'] = [1e-3, 3e-3]
    held_out = {**content['tasks']['digits'], 'rates_of': 'digits', 'title': 'held out (%)'}
    del held_out['learning_rates']
    content['tasks']['held_out'] = held_out
    results = Results(load_comparison(write(tmp_path / 'c.yaml', content)), tmp_path)
    searches = [run.name for run in results.ready(['digits'], ['icon'])]
    assert len(searches) == 2 and results.left(['held_out'], ['icon']) == 3
    assert [run.name for run in results.ready(['held_out'], ['icon'])] == searches
    assert [run.name for run in results.ready(['digits', 'held_out'], ['icon'])] == searches
    assert '## held out' not in search_text(results)
    finish_pair(results, 'digits', 'icon', [30.0, 40.0], [])
    (run,) = results.ready(['held_out'], ['icon'])
    assert run.name == 'held_out/icon/seed0' and run.settings['learning_rate'] == 3e-3


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(rates_of='digts'), "rates_of: unknown task 'digts' .did you mean 'digits'"),
        (dict(rates_of='digits', learning_rates=[1e-3]), 'needs either learning_rates or rates_of'),
        (dict(), 'needs either learning_rates or rates_of'),
        (dict(rates_of='held_out'), "task 'held_out' has no rates of its own either"),
    ],
)
def test_rates_that_cannot_be_carried_over(change, message, tmp_path):
    content = deepcopy(COMPARISON)
    held_out = {**content['tasks']['digits'], 'title': 'held out (%)'}
    del held_out['learning_rates']
    content['tasks']['held_out'] = {**held_out, **change}
    with pytest.raises(ComparisonError, match=message):
        load_comparison(write(tmp_path / 'c.yaml', content))


def test_runs_of_version_0_1_count(tmp_path):
    """They were in a folder `cells`."""
    results = make_results(tmp_path)
    finish_pair(results, 'up', 'icon', [0.4, 0.5, 0.5], [0.75])
    (tmp_path / 'runs').rename(tmp_path / 'cells')
    again = Results(results.comparison, tmp_path)
    assert again.finished == results.finished and len(again.finished) == 4
    assert list(result_files(tmp_path)) == sorted(again.finished)
    (run, *_) = again.comparison.searches(again.comparison.tasks['up'], again.comparison.methods['icon'])
    finish(again, run, 0.9)
    assert result_files(tmp_path)[run.name].parts[-4] == 'runs'


def test_the_first_seeds(tmp_path):
    comparison = load_comparison(ROOT / 'configs' / 'comparison' / 'small.yaml')
    assert take_seeds(comparison, None) is comparison and take_seeds(comparison, 2).seeds == (0, 1)
    for number in (0, 4):
        with pytest.raises(SystemExit, match=f'--seeds must be from 1 to 3, .* got {number}'):
            take_seeds(comparison, number)


def test_report(tmp_path):
    results = make_results(tmp_path)
    finish_pair(results, 'up', 'full', [0.5, 0.7, None], [0.71, 0.73], share=1.0)
    finish_pair(results, 'up', 'frozen', [0.4, None, None], [0.71, None], share=0.0)
    finish_pair(results, 'up', 'icon', [0.4, 0.5, 0.5], [0.75])
    finish_pair(results, 'down', 'full', [0.9, 1.0], [0.9, 0.7], share=1.0)
    finish_pair(results, 'down', 'frozen', [None, None], [], share=0.0)
    rows = make_rows(results)
    assert rows['up', 'full'].mean == pytest.approx(72) and rows['up', 'full'].std == statistics.stdev([71, 73])
    ranks = {key: row.rank for key, row in rows.items()}
    expected = {('up', 'full'): 2, ('up', 'frozen'): 3, ('up', 'icon'): 1, ('down', 'full'): 1, ('down', 'frozen'): 2}
    assert ranks == expected
    titles, lines = table(results, rows, '**{}**')
    assert titles == ['method', 'backbone share', 'up (%)', 'down (m)', 'mean rank']
    assert lines == [
        ['full', '100.00%', '72.0 ± 1.4', '**0.800 ± 0.141**', '1.5'],
        ['frozen', '0.00%', 'diverged (1 of 2)', 'diverged', '2.5'],
        ['icon', '5.00%', '**75.0 (n=1)**', '-', '1.0 (1 of 2)'],
    ]
    search = search_text(results)
    assert '| full | 50.0 | **70.0** | diverged |' in search and '| icon | 40.0 | **50.0** | 50.0 |' in search
    (tmp_path / 'report').mkdir()
    (tmp_path / 'report' / 'ranks.png').write_text('of an earlier report')
    report(results, tmp_path / 'report', Console(quiet=True))
    assert not (tmp_path / 'report' / 'ranks.png').exists()  # no part of the grid is complete
    for name in ('tradeoff.png', 'curves.png'):
        assert cv2.imread(str(tmp_path / 'report' / name)).std() > 5
    assert len((tmp_path / 'report' / 'results.csv').read_text().splitlines()) == 6
    assert len(json.loads((tmp_path / 'report' / 'results.json').read_text())['rows']) == 5


@pytest.mark.parametrize(
    'damage',
    [
        lambda text: '{"settings": ',
        lambda text: '[1, 2]',
        lambda text: text.replace('"score": 0.5, ', ''),
        lambda text: text.replace('"score": 0.5', '"score": "0.5"'),
        lambda text: text.replace('"score": 0.5', '"score": NaN'),
        lambda text: text.replace('"score": 0.5', '"score": 0.5, "images": {"numerators": [1, 0, 1]}'),
        lambda text: text.replace('"score": 0.5', '"score": 0.5, "images": {"numerators": [1, "x"]}'),
        lambda text: text.replace('"train_seconds": 2.0', '"train_seconds": null'),
        lambda text: text.replace('"curve": [[1', '"curve": [[1, 7'),
        lambda text: json.dumps({**json.loads(text), 'settings': 'lost'}),
    ],
)
def test_a_damaged_cell(damage, tmp_path):
    results = make_results(tmp_path)
    (run, *_) = results.ready(['up'], ['icon'])
    finish(results, run, 0.5)
    file = results.file(run)
    assert damage(file.read_text()) != file.read_text()
    file.write_text(damage(file.read_text()))
    with pytest.raises(ComparisonError, match='search_lr0.001.json is damaged; remove it'):
        Results(results.comparison, results.folder)


def test_the_images_of_a_task_changed_between_runs(tmp_path):
    """What is compared pair by pair is of the same images. The search has others."""
    results = make_results(tmp_path)
    task, method = results.comparison.tasks['up'], results.comparison.methods['full']
    searches, seeds = results.comparison.searches(task, method), results.comparison.runs(task, method, 1e-3)
    for run in (*searches, *seeds):
        finish(results, run, 0.5)
    for run, images in ((searches[0], [0, 1]), (seeds[0], [1, 0, 1, 0]), (seeds[1], [1, 0, 1, 0, 1, 0])):
        content = json.loads(results.file(run).read_text())
        results.file(run).write_text(json.dumps({**content, 'images': dict(numerators=images)}))
    with pytest.raises(ComparisonError, match="seed1.json has the scores of 6 images, .*seed0.json those of 4: .*'up'"):
        Results(results.comparison, results.folder)
    results.file(seeds[1]).unlink()
    assert len(Results(results.comparison, results.folder).finished) == 4


def test_one_run_of_each_kind_is_rehearsed(tmp_path):
    """Of a method on a task, until one is finished. The search counts on its own where it has settings of its own."""
    content = deepcopy(COMPARISON)
    own = dict(DIGITS, learning_rates=[1e-2, 1e-3], search_options={'val_dataloader.dataset.split': 'train'})
    given = {key: value for key, value in DIGITS.items() if key != 'learning_rates'}
    content['tasks'] = dict(dev=DIGITS, own=own, held=dict(given, rates_of='dev'))
    results = Results(load_comparison(write(tmp_path / 'c.yaml', content)), tmp_path)

    def rehearsed(tasks, methods):
        return [(run.name, run.learning_rate) for run in results.untried(tasks, methods)]

    assert rehearsed(['own'], ['full']) == [('own/full/search_lr0.01', 1e-2), ('own/full/seed0', 1e-2)]
    methods = ['full', 'icon']
    searches, seeds = (
        [(f'{name.format(method)}', 3e-3) for method in methods] for name in ('dev/{}/search_lr0.003', 'held/{}/seed0')
    )
    assert sorted(rehearsed(['dev', 'held'], methods)) == sorted(rehearsed(['held'], methods)) == searches + seeds
    assert rehearsed(['dev'], methods) == searches
    for run in results.ready(['dev', 'own'], ['full']):
        finish(results, run, 0.5)
    assert rehearsed(['dev', 'own', 'held'], ['full']) == [('own/full/seed0', 1e-2), ('held/full/seed0', 3e-3)]


def test_a_report_of_nothing(tmp_path):
    results = make_results(tmp_path)
    report(results, tmp_path, Console(quiet=True))
    assert '| icon | - | - | - | - |' in (tmp_path / 'table.md').read_text()


def test_the_comparison_in_the_repository():
    comparison = load_comparison(ROOT / 'configs' / 'comparison' / 'small.yaml')
    assert len(comparison.pairs(comparison.tasks, comparison.methods)) == 16
    assert comparison.tasks['depth'].config == 'configs/scenes/depth_swin-scenes_full_target.py'


def test_rates_like_1e_3_are_numbers(tmp_path):
    text = yaml.safe_dump(COMPARISON).replace('0.003', '3e-3')
    (tmp_path / 'c.yaml').write_text(text)
    assert load_comparison(tmp_path / 'c.yaml').tasks['digits'].learning_rates == (3e-3, 1e30)


@pytest.mark.parametrize(
    ('where', 'value', 'message'),
    [
        ('titel', 'x', "unknown key 'titel' in the file (did you mean 'title'?)"),
        ('seeds', 3, 'seeds must be a list with at least one entry, it is 3'),
        ('seeds', [0, 100], 'search_seed 100 is one of the seeds'),
        ('tasks.digits.metrik', 'x', "unknown key 'metrik' in tasks.digits (did you mean 'metric'?)"),
        ('tasks.digits.metric', None, "tasks.digits lacks the key 'metric'"),
        ('tasks.digits.config', 'nowhere.py', 'tasks.digits.config: there is no file'),
        ('tasks.digits.learning_rates', ['fast'], "tasks.digits.learning_rates must be float, it is 'fast'"),
        ('methods.icon.method', dict(bottleneck=4), 'methods.icon.method needs a type'),
        ('methods.icon.method', None, 'methods.icon needs either method or methods'),
        ('methods.icon.methods', [dict(where='encoder', type='lora')], 'methods.icon needs either method or methods'),
        ('methods.icon.tasks', ['digit'], "methods.icon.tasks: unknown task 'digit' (did you mean 'digits'?)"),
        ('methods.icon.learning_rates', dict(digit=[1.0]), "methods.icon.learning_rates: unknown task 'digit'"),
        ('methods.icon.learning_rates', dict(digits=[]), 'methods.icon.learning_rates.digits must be a list'),
        ('tasks.digits.pictures', ['a'], "tasks.digits.pictures must be int, it is 'a'"),
        ('methods.icon.title', 'full fine-tuning', "two methods have the title 'full fine-tuning'"),
    ],
)
def test_mistakes_in_the_file(tmp_path, where, value, message):
    content = deepcopy(COMPARISON)
    *parents, key = where.split('.')
    node = content
    for parent in parents:
        node = node[parent]
    node[key] = value
    if value is None:
        del node[key]
    with pytest.raises(ComparisonError) as error:
        load_comparison(write(tmp_path / 'c.yaml', content))
    assert message in str(error.value) and 'c.yaml' in str(error.value)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.yaml'], 'error in the comparison: cannot read the comparison none.yaml'),
        (
            ['configs/comparison/small.yaml', '--tasks', 'dept'],
            "--tasks: 'dept' is not in the comparison; it has digits",
        ),
        (['configs/comparison/small.yaml', '--methods', 'x'], "--methods: 'x' is not in the comparison; it has full"),
    ],
)
def test_mistakes_on_the_command_line(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert message in str(error.value)


def test_no_file_and_no_yaml(tmp_path):
    with pytest.raises(ComparisonError, match='cannot read the comparison'):
        load_comparison(tmp_path / 'none.yaml')
    (tmp_path / 'c.yaml').write_text('a: [')
    with pytest.raises(ComparisonError, match='is no YAML'):
        load_comparison(tmp_path / 'c.yaml')


@pytest.mark.parametrize('path', sorted((ROOT / 'configs' / 'comparison').glob('*.yaml')), ids=lambda path: path.stem)
def test_comparisons_in_configs(path, import_methods, tmp_path):
    """Their methods can be made, their options are settings of the configs, the README counts their runs."""
    if path.stem == 'my_images':  # a template, which names a folder beside it
        for index in range(10):
            file = tmp_path / 'my_images' / f'class{index % 2}' / f'{index}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), np.full((4, 4, 3), index, np.uint8))
        comparison = load_comparison(Path(shutil.copy(path, tmp_path)))
    else:
        comparison = load_comparison(path)
    for task in comparison.tasks.values():
        for name in task.options.get('custom_imports.imports', ()):
            if name != 'iconformer_mm':
                import_methods(name)
    for method in comparison.methods.values():
        for each in [method.method] if method.method is not None else method.methods:
            build_method({key: value for key, value in each.items() if key != 'where'})
    for task in comparison.tasks.values():
        cfg = load_config(str(ROOT / task.config))
        for key in {**task.options, **task.search_options}:
            part = cfg
            for name in key.split('.')[:-1]:
                part = part[int(name)] if isinstance(part, list) else part[name]
    pairs = comparison.pairs(comparison.tasks, comparison.methods)
    for task, method in pairs:
        assert comparison.rates(task, method)
    searches = {run.name for pair in pairs for run in comparison.searches(*pair)}
    runs = len(searches) + len(comparison.seeds) * len(pairs)
    readme = (path.parent / 'README.md').read_text(encoding='utf-8')
    assert f'| `{path.name}` | {runs} |' in readme
