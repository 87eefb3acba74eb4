"""The comparisons of the quickstart and of the scenes, shortened: the same files with fewer steps."""

import json

import cv2
import numpy as np
import pytest
import yaml
from commands import tool
from conftest import ROOT

from iconformer_mm.checkpoint import read_adapter

CONFIGS = ROOT / 'configs' / 'comparison'


def shorten(name, path, options, methods=None):
    """A copy of a comparison with options for every run, and perhaps fewer methods."""
    content = yaml.safe_load((CONFIGS / f'{name}.yaml').read_text())
    for task in content['tasks'].values():
        task.update({key: str(CONFIGS / task[key]) for key in ('config', 'base')}, options=options)
    if methods is not None:
        content['methods'] = {name: content['methods'][name] for name in methods}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_the_script_runs_the_comparison():
    script = (ROOT / 'tools' / 'quickstart.sh').read_text()
    assert 'tools/compare.py configs/comparison/quickstart.yaml --out work_dirs/quickstart' in script


def test_quickstart(tmp_path):
    """A table, plots, and frozen weights that are the base's, bit by bit."""
    short = shorten('quickstart', tmp_path / 'q.yaml', {'train_cfg.max_epochs': 6, 'train_cfg.val_interval': 6})
    output = tool('compare.py', short, '--seeds', 1, '--jobs', 2, '--out', tmp_path)
    assert 'linear probing' in output and 'left' not in output.replace('left 0', '')
    rows = {row['method']: row for row in json.loads((tmp_path / 'results.json').read_text())['rows']}
    assert list(rows) == ['frozen', 'adaptformer', 'icon', 'full']
    # Closed formulas for width 96, 4 blocks, bottleneck 16, 10 classes.
    d, c, head = 96, 16, 96 * 10 + 10
    projections = 2 * d * c + c + d
    kernels = c * 9 * c + 2 * 9 * c
    counts = [row['trained_parameters'] for row in rows.values()]
    # Of the last block only the class token is read, which no kernel filters.
    icon = 4 * projections + 3 * kernels
    assert counts == [head, head + 4 * projections, head + icon, 454_080 + head]
    assert [row['learning_rate'] for row in rows.values()] == [1e-2, 3e-3, 1e-2, 3e-3]
    # Before a single step it would be chance, 10 %.
    assert all(row['mean'] > 50 and row['seeds'] == 1 for row in rows.values())
    for method in rows:
        run = json.loads((tmp_path / 'runs' / 'digits' / method / 'seed0.json').read_text())
        assert run['frozen_weights_checked'] == (method != 'full')
    kept = {path.parent.name: path for path in (tmp_path / 'runs').rglob('*.safetensors')}
    assert set(kept) == {'frozen', 'adaptformer', 'icon'}  # of the first seed
    content, tensors = read_adapter(kept['icon'])
    line = next(line for line in (tmp_path / 'table.md').read_text().splitlines() if '| iCoN |' in line)
    cells = [cell.strip(' *') for cell in line.strip('|').split('|')]
    assert cells[:3] == ['iCoN', f'{counts[2]:,}', f'{icon / 454_080:.2%}']
    assert cells[3] == f'{rows["icon"]["mean"]:.1f}' and cells[5] == f'{kept["icon"].stat().st_size / 2**10:,.0f}'
    assert content['method']['type'] == 'icon' and sum(t.numel() for t in tensors.values()) == counts[2] + kernels
    assert (tmp_path / 'tradeoff.png').stat().st_size > 10_000
    assert 'There was no search' in (tmp_path / 'search.md').read_text()
    assert (tmp_path / 'table.md').read_text().count('\n') == 8
    assert not (tmp_path / 'predictions.png').exists()


@pytest.mark.filterwarnings('ignore')
def test_scenes(tmp_path):
    """All three tasks by two methods for two iterations: a table, and a picture of what was predicted."""
    make = ['dataset_converters/make_scenes.py', '--out', 'data/scenes', '--styles', 'target', '--train', 8, '--val', 9]
    tool(*make, cwd=tmp_path)
    options = {'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2}
    short = shorten('scenes', tmp_path / 's.yaml', options, ['frozen', 'icon'])
    output = tool('compare.py', short, '--seeds', 1, '--jobs', 2, '--out', 'out', cwd=tmp_path)
    assert 'mask AP' in output and 'predictions.png' in output
    rows = json.loads((tmp_path / 'out' / 'results.json').read_text())['rows']
    assert [(row['task'], row['method']) for row in rows] == [
        (task, method) for task in ('semantic', 'instance', 'depth') for method in ('frozen', 'icon')
    ]
    picture = cv2.imread(str(tmp_path / 'out' / 'predictions.png'))
    assert picture is not None and picture.std() > 10
    runs = tmp_path / 'out' / 'runs'
    depth = np.load(runs / 'depth' / 'icon' / 'seed0.npz')
    image = cv2.imread(
        str(
            tmp_path
            / 'data/scenes/target/nyu/images/test'
            / sorted(path.name for path in (tmp_path / 'data/scenes/target/nyu/images/test').iterdir())[3]
        )
    )
    assert np.array_equal(depth['images'][0], image[..., ::-1]) and depth['truth'].shape == (2, 96, 128)
    assert depth['truth'].min() > 0 and depth['truth'].max() <= 10 and depth['predicted'].shape == (2, 96, 128)
    classes = np.load(runs / 'semantic' / 'frozen' / 'seed0.npz')
    assert classes['truth'].shape == classes['predicted'].shape == (2, 96, 128, 3)
