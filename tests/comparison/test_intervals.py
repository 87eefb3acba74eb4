import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import ROOT

from iconformer_mm.comparison.intervals import average_ranks, differences_text, largest_grid, plot_ranks, reference_of
from iconformer_mm.comparison.results import NUMBERS, Results
from iconformer_mm.comparison.spec import Comparison, Method, Task


def make_task(name, higher):
    return Task(name, 'config.py', 'base', 'score', name, (1e-3,), higher_is_better=higher)


def make_comparison(**changes):
    tasks = {name: make_task(name, name == 'up') for name in ('up', 'down')}
    types = {'frozen': 'frozen', 'icon': 'icon', 'lora': 'lora'}
    methods = {name: Method(name, name.title(), dict(type=kind), ('up', 'down')) for name, kind in types.items()}
    return Comparison('title', (0, 1), (100,), tasks, methods, **changes)


def finish(results, task, method, scores, images=None):
    """Write the files of runs, one for each seed."""
    comparison = results.comparison
    for index, run in enumerate(
        comparison.runs(comparison.tasks[task], comparison.methods[method], 1e-3)[: len(scores)]
    ):
        path = results.file(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = dict(dict.fromkeys(NUMBERS, 1), settings=run.settings, score=scores[index], curve=[])
        if images is not None:
            content['images'] = dict(numerators=list(images[index]))
        path.write_text(json.dumps(content))


def test_differences(tmp_path):
    """Better is positive, whichever way the score goes; images in common make small differences certain."""
    results = Results(make_comparison(), tmp_path)
    hard = np.random.default_rng(0).normal(50, 20, (2, 100))
    for name, more in (('icon', 1.0), ('frozen', 0.0)):
        finish(results, 'up', name, (hard + more).mean(axis=1).tolist(), hard + more)
        finish(results, 'down', name, (hard - more).mean(axis=1).tolist(), hard - more)
    finish(results, 'up', 'lora', [None, 50.0])
    text = differences_text(Results(results.comparison, tmp_path))
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if '| Frozen' in line]
    assert [row[4:] for row in rows] == [['**+1.0**', '1.0 to 1.0']] * 2
    for row in rows:
        low, high = map(float, row[3].split(' to '))
        assert row[1] == '2' and low < float(row[2]) < high and 3 < high - low < 30
    assert text.count('| Icon |') == 2 and '| Lora' not in text  # a run diverged


def test_the_reference():
    assert reference_of(make_comparison()).name == 'icon'
    assert reference_of(make_comparison(reference='lora')).name == 'lora'


def test_an_unknown_reference_is_an_error(tmp_path):
    from iconformer_mm.comparison.spec import ComparisonError, load_comparison

    text = (ROOT / 'configs' / 'comparison' / 'quickstart.yaml').read_text()
    folder = ROOT / 'configs' / 'comparison'
    (tmp_path / 'c.yaml').write_text('reference: icno\n' + text.replace('../', f'{folder.parent}/'))
    with pytest.raises(ComparisonError, match="reference: unknown method 'icno' .did you mean 'icon'"):
        load_comparison(tmp_path / 'c.yaml')


def test_ranks(tmp_path):
    means = {
        ('up', 'icon'): 3.0, ('up', 'lora'): 3.0, ('up', 'frozen'): 1.0,
        ('down', 'icon'): 0.1, ('down', 'lora'): 0.3, ('down', 'frozen'): 0.2,
    }  # fmt: skip
    comparison = make_comparison()
    tasks, methods = largest_grid(comparison, means)
    ranks = average_ranks(tasks, methods, means)
    assert ranks == dict(Icon=1.25, Lora=2.25, Frozen=2.5)
    plot_ranks(ranks, ['up', 'down'], tmp_path / 'ranks.png')
    assert cv2.imread(str(tmp_path / 'ranks.png')).std() > 5
    del means['down', 'lora']
    tasks, methods = largest_grid(comparison, means)
    assert average_ranks(tasks, methods, means) == dict(Icon=1.0, Frozen=2.0)
    assert largest_grid(comparison, [])[1] == []


def test_ranks_count_held_out_tasks_alone():
    """Of these 3 x 4 cells the largest complete part has all methods on two tasks; the searched task does not count."""
    names = ('a', 'b', 'c', 'd')
    tasks = {'dev': make_task('dev', True)}
    tasks.update({name: replace(make_task(name, True), rates_of='dev') for name in names})
    methods = {name: Method(name, name.title(), dict(type=name), tuple(tasks)) for name in ('icon', 'lora', 'frozen')}
    comparison = Comparison('title', (0,), (100,), tasks, methods)
    done = {('dev', name) for name in methods}
    done |= {('b', name) for name in methods} | {('d', name) for name in methods} | {('a', 'icon'), ('a', 'lora')}
    found, complete = largest_grid(comparison, done)
    assert ([task.name for task in found], [method.name for method in complete]) == (['b', 'd'], list(methods))
    # Many tasks, each with another method left out, take no time.
    many = {f't{index}': make_task(f't{index}', True) for index in range(60)}
    names = [f'm{index}' for index in range(6)]
    methods = {name: Method(name, name, dict(type=name), tuple(many)) for name in names}
    done = {(task, name) for i, task in enumerate(many) for j, name in enumerate(names) if i % 6 != j or i < 30}
    found, complete = largest_grid(Comparison('title', (0,), (100,), many, methods), done)
    assert (len(found), len(complete)) == (30, 6)
