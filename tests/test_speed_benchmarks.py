"""The benchmarks of speed run on tiny cases, and their ratios are those of their times; no time is asserted."""

import importlib.util
import json
import math
import statistics
import sys
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from conftest import ROOT
from torch import nn

sys.path.insert(0, str(ROOT / 'benchmarks'))
import measure  # noqa: E402
import mixed_batch  # noqa: E402
import op  # noqa: E402
import step  # noqa: E402
import stored  # noqa: E402

SPEC = importlib.util.spec_from_file_location('adapter_benchmark', ROOT / 'benchmarks' / 'adapter.py')
adapter = sys.modules[SPEC.name] = importlib.util.module_from_spec(SPEC)  # tools have another adapter.py
SPEC.loader.exec_module(adapter)
HASTY = partial(measure.interleave, min_seconds=1e-4)


@pytest.fixture(autouse=True)
def _same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(module, monkeypatch, out, *options):
    """Call a program, and read its tables."""
    monkeypatch.setattr(sys, 'argv', ['program', '--out', str(out), '--rounds', '3', *options])
    module.main()
    assert (out / 'results.png').read_bytes().startswith(b'\x89PNG')
    text = (out / 'results.md').read_text()
    tables = json.loads((out / 'results.json').read_text())
    assert torch.__version__ in text and tables.pop('settings')['dtype'] == 'float32'
    for name, rows in tables.items():
        assert f'## {name}\n' in text and rows
        for row in rows:
            for value in row.values():
                numbers = value if isinstance(value, list) else [value]
                assert all(isinstance(n, str) or (math.isfinite(n) and n > 0) for n in numbers), row
    return tables


def check_ratios(rows, column, reference):
    """A column has the median over the rounds of the ratio to a contestant."""
    seconds = {(row['case'], row['contestant']): row['seconds'] for row in rows}
    for row in rows:
        assert len(row['seconds']) == 3
        assert row['ms'] == 1000 * statistics.median(row['seconds'])
        pairs = zip(row['seconds'], seconds[row['case'], reference])
        assert row[column] == statistics.median(a / b for a, b in pairs)


def test_op(monkeypatch, tmp_path):
    monkeypatch.setattr(op, 'COPIED', 2**20)
    monkeypatch.setattr(op, 'interleave', HASTY)
    monkeypatch.setitem(op.CASES, 'vit-b-224', op.Shape(2, 3, 4, channels=4))
    monkeypatch.setitem(op.CASES, 'vit-b-512-k5', op.Shape(1, 3, 4, channels=4, size=5))
    monkeypatch.setitem(op.GROWTH, 'growth-map', [op.Shape(1, 2, 2, channels=4), op.Shape(1, 4, 4, channels=4)])
    tables = run(op, monkeypatch, tmp_path, '--cases', 'vit-b-224', 'vit-b-512-k5', 'growth-map')
    rows = tables['times']
    names = ['grouped convolution', 'loop over samples', 'shifted products', 'ours, numba', 'ours, auto']
    assert [row['contestant'] for row in rows] == 2 * names
    check_ratios(rows, 'to ours', 'ours, auto')
    for row in rows:
        copies = next(copy for copy in tables['copies'] if copy['case'] == row['case'])
        moved = 6 * copies['MiB'] * 2**20
        for column, key, size in (
            ('times the copy bound', 'seconds', 2**20),
            ('of own size', 'seconds, own size', copies['MiB'] * 2**20),
        ):
            bounds = [seconds * moved / (2 * size) for seconds in copies[key]]
            assert row[column] == pytest.approx(statistics.median(a / b for a, b in zip(row['seconds'], bounds)))
    for row in tables['growth']:
        assert row['ns a token'] == pytest.approx(1e9 * statistics.median(row['seconds']) / row['tokens'])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_ways_to_compute_the_op_agree(dtype):
    problem = op.Problem(op.Shape(2, 5, 6, channels=8, size=3), 'cpu', dtype)
    found = {**op.ways('cpu', compiled=False), 'channels last': op.grouped_channels_last}
    problem.check(found)
    with pytest.raises(RuntimeError, match='twice is off'):
        problem.check({'twice': lambda x, kernels: 2 * op.loop(x, kernels)})


def test_adapter(monkeypatch, tmp_path):
    monkeypatch.setattr(adapter, 'interleave', HASTY)
    monkeypatch.setitem(adapter.CASES, 'vit-b', adapter.Case(2, adapter.TokenGrid(3, 4, num_prefix_tokens=1), 16))
    rows = run(adapter, monkeypatch, tmp_path, '--cases', 'vit-b')['times']
    assert [row['contestant'] for row in rows] == list(adapter.ADAPTERS)
    check_ratios(rows, 'to AdaptFormer', 'AdaptFormer')


SWIN = {f'model.backbone.{key}': value for key, value in dict(embed_dims=8, depths=[1] * 4, num_heads=[1] * 4).items()}
PYRAMID = [8, 16, 32, 64]
TINY = {
    'vit-s': {
        'model.backbone.arch': dict(_delete_=True, embed_dims=16, num_layers=1, num_heads=2, feedforward_channels=32),
        'model.backbone.img_size': 32,
        'model.neck.input_features': 16,
        'model.head.in_channels': 16,
    },
    'upernet-swin-l': {
        **SWIN,
        'model.data_preprocessor.size': (64, 64),
        'model.decode_head.in_channels': PYRAMID,
        'model.decode_head.channels': 8,
        'model.auxiliary_head.in_channels': 32,
        'model.auxiliary_head.channels': 8,
    },
    'cascade-swin-b': {
        **SWIN,
        'model.neck.in_channels': PYRAMID,
        'model.neck.out_channels': 16,
        'model.rpn_head.in_channels': 16,
        'model.rpn_head.feat_channels': 16,
        'model.roi_head.bbox_roi_extractor.out_channels': 16,
        'model.roi_head.mask_roi_extractor.out_channels': 16,
        **{f'model.roi_head.bbox_head.{stage}.in_channels': 16 for stage in range(3)},
        **{f'model.roi_head.bbox_head.{stage}.fc_out_channels': 16 for stage in range(3)},
        'model.roi_head.mask_head.in_channels': 16,
        'model.roi_head.mask_head.conv_out_channels': 8,
        'model.train_cfg.rpn_proposal.nms_pre': 20,
        **{f'model.train_cfg.rcnn.{stage}.sampler.num': 8 for stage in range(3)},
        'model.test_cfg.rpn.nms_pre': 20,
    },
}
SIZES = {'vit-s': (32, 32), 'upernet-swin-l': (64, 64), 'cascade-swin-b': (64, 90)}


def shrink(monkeypatch, name):
    """The case with a tiny model and tiny images."""
    monkeypatch.setitem(step.CASES, name, step.Case(step.CASES[name].config, SIZES[name], 1, TINY[name]))
    return step.CASES[name]


@pytest.mark.filterwarnings('ignore')
def test_step(monkeypatch, tmp_path):
    """A classifier, a segmenter and a detector."""
    for name in TINY:
        shrink(monkeypatch, name)
    methods = ['full', 'icon', 'adaptformer']
    tables = run(step, monkeypatch, tmp_path, '--cases', *TINY, '--methods', *methods, '--batch', '2')
    assert [(row['case'], row['contestant']) for row in tables['training step']] == [*product(TINY, methods)]
    methods[0] = 'unadapted'
    assert [(row['case'], row['contestant']) for row in tables['inference']] == [*product(TINY, methods)]
    check_ratios(tables['training step'], 'to full', 'full')
    check_ratios(tables['training step'], 'to adaptformer', 'adaptformer')
    check_ratios(tables['inference'], 'to unadapted', 'unadapted')
    for row in (*tables['training step'], *tables['inference']):
        assert row['images/s'] == pytest.approx(2 / statistics.median(row['seconds']))


@pytest.mark.filterwarnings('ignore')
def test_mixed_batch(monkeypatch, tmp_path):
    shrink(monkeypatch, 'vit-s')
    tables = run(mixed_batch, monkeypatch, tmp_path, '--cases', 'vit-s', '--images', '4', '--adapters', '1', '2')
    rows = tables['one batch, many adapters']
    assert [row['contestant'] for row in rows] == [
        'one adapter',
        'mixed, 1 adapters',
        'mixed, 2 adapters',
        'by group, 2 adapters',
        'one by one, 2 adapters',
    ]
    check_ratios(rows, 'to one adapter', 'one adapter')
    check_ratios(rows, 'to one by one', 'one by one, 2 adapters')


@pytest.mark.filterwarnings('ignore')
def test_growth(monkeypatch, tmp_path):
    shrink(monkeypatch, 'vit-s')
    monkeypatch.setattr(step, 'GROWTH', [((32, 32), 2), ((32, 32), 3)])
    options = ['--cases', 'vit-s', '--methods', 'icon', 'adaptformer', '--growth', '2']
    rows = run(step, monkeypatch, tmp_path, *options, '--rounds', '0')['growth']
    assert [(row['images'], row['contestant']) for row in rows] == [*product([2, 3], ['icon', 'adaptformer'])]
    for row in rows:
        assert row['ns a pixel'] == pytest.approx(1e9 * statistics.median(row['seconds']) / (row['images'] * 32 * 32))
    for icon, other in (rows[:2], rows[2:]):
        assert icon['to adaptformer'] == pytest.approx(
            statistics.median(a / b for a, b in zip(icon['seconds'], other['seconds']))
        )


@pytest.mark.filterwarnings('ignore')
def test_models_share_what_stays_frozen(monkeypatch):
    case = shrink(monkeypatch, 'vit-s')
    models = step.build_all(case, ['full', 'icon', 'lora', step.UNADAPTED], 'cpu')
    states = {method: dict(model.backbone.named_parameters()) for method, model in models.items()}
    for name, parameter in states[step.UNADAPTED].items():
        assert states['icon'][name] is parameter and states['lora'][name] is parameter
        assert states['full'][name] is not parameter and states['full'][name].requires_grad
    before = {name: p.clone() for name, p in states['icon'].items()}
    data = step.make_data(models['icon'], case, 2, training=True)
    for method in ('icon', 'full'):
        step.training(models[method], data, torch.float32)()
    for name, parameter in states['icon'].items():
        # The head reads the class token alone, so that the filter of the last block is not trained.
        idle = 'adapter_attention.icon' in name and f'layers.{len(models["icon"].backbone.layers) - 1}.' in name
        assert ('adapter' in name and not idle) == parameter.requires_grad
        assert parameter.requires_grad or torch.equal(parameter, before[name])


@pytest.mark.filterwarnings('ignore')
def test_memory_in_a_process_of_its_own(monkeypatch, tmp_path):
    case = shrink(monkeypatch, 'vit-s')
    options = ['--cases', 'vit-s', '--methods', 'full', '--memory', '--rounds', '0', '--batch', '2']
    (row,) = run(step, monkeypatch, tmp_path, *options)['memory of a training step']
    assert row['peak to full'] == row['live tensors to full'] == 1
    model = step.build(case, 'cpu')
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    assert 3 * weights < row['live tensors (MiB)'] < row['peak (MiB)'] < step.resident_peak() / 2**20 + 2000


def test_count_of_operations():
    """A layer of 4 x 8: forward, and without the images' gradient as much for its weight."""
    layer, x = nn.Linear(4, 8), torch.ones(3, 4)
    counts = step.count_operations(dict(a=lambda: layer(x), b=lambda: layer(x).sum().backward()), batch=3)
    assert counts == pytest.approx(dict(a=2 * 4 * 8 / 1e9, b=2 * 2 * 4 * 8 / 1e9))
    rows = [dict(contestant='a'), dict(contestant='b')]
    step.add_operations(rows, counts, 'a', 'none')
    assert rows[1]['GFLOP to a'] == 2 and 'GFLOP to none' not in rows[1]


# What these look into, storages and what the graph keeps, is otherwise in torch 2.1.
recent = pytest.mark.skipif(torch.__version__.startswith('2.1.'), reason='torch 2.1 cannot be measured in this way')


@recent
def test_live_tensors():
    values = torch.zeros(1024)
    with step.LiveTensors() as live:
        one = values + 1
        assert live.alive == one.nbytes
        two = one.view(32, 32)
        del one
        assert live.alive == two.nbytes
        del two
        assert live.alive == 0
        torch.cat((values, values))
    assert live.alive == 0 and live.peak == 2 * values.nbytes


def test_stored_bytes():
    """Full fine-tuning stores what the layers read, a frozen model only what GELU read (3 samples, 4 bytes a value)."""
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(3, 4, requires_grad=True)
    assert stored.stored_bytes(model, model(x).sum()) == dict(Addmm=3 * (4 + 8) * 4, Gelu=3 * 8 * 4)
    model.requires_grad_(False)
    assert stored.stored_bytes(model, model(x).sum()) == dict(Gelu=3 * 8 * 4)


@recent
@pytest.mark.filterwarnings('ignore')
def test_stored_of_a_model(monkeypatch, tmp_path):
    shrink(monkeypatch, 'vit-s')
    monkeypatch.setitem(step.CASES, 'vit-s', replace(step.CASES['vit-s'], batch=2))
    options = ['--out', str(tmp_path), '--cases', 'vit-s', '--methods', 'full', 'icon']
    monkeypatch.setattr(sys, 'argv', ['program', *options])
    stored.main()
    *parts, whole = json.loads((tmp_path / 'results.json').read_text())['vit-s, MiB stored']
    for method in ('full', 'icon'):
        assert sum(row[method] for row in parts) == pytest.approx(whole[method])
    assert whole['icon'] < whole['full']


def test_interleaved_rounds():
    calls = []
    contestants = {name: lambda name=name: calls.append(name) for name in 'ab'}
    with measure.progress_bar() as progress:
        times = measure.interleave(contestants, 3, progress, 'letters', min_seconds=0)
    assert ''.join(calls) == 'ab' * 4 and [len(seconds) for seconds in times.values()] == [3, 3]
    assert measure.ratio([1.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2


@pytest.mark.parametrize(
    ('module', 'options', 'message'),
    [
        (op, ['--rounds', '0'], 'at least 1'),
        (mixed_batch, ['--images', '2', '--adapters', '3'], '--adapters must lie between 1 and --images (2), got [3]'),
        (step, ['--batch', '0'], 'batch must be at least 1'),
        (step, ['--cases', 'resnet'], 'invalid choice'),
    ],
)
def test_mistakes_are_said(module, options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['program', *options])
    with pytest.raises(SystemExit) as error:
        module.main()
    assert message in f'{error.value}{capsys.readouterr().err}'
