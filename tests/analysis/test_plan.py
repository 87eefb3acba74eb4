"""The plan of what fits where: counted by hand, and consistent with what is measured."""

import json

import pytest

from iconformer_mm import inject
from iconformer_mm.analysis.inspection import cost_of
from iconformer_mm.analysis.plan import DDP, GIB, ONE, SHARDED, plan_memory
from iconformer_mm.cli import inspect as inspect_command
from iconformer_mm.engine import load_config
from iconformer_mm.engine.config import build_model

DIGITS = 'configs/quickstart/vit-quickstart_icon_digits.py'
SHAPE = (28, 28)


def way_of(plan, strategy, frozen_dtype, with_cp=False):
    return next(w for w in plan.ways if (w.strategy, w.frozen_dtype, w.with_cp) == (strategy, frozen_dtype, with_cp))


@pytest.fixture(scope='module')
def cfg():
    from conftest import ROOT

    return load_config(str(ROOT / DIGITS))


@pytest.fixture(scope='module')
def plan(cfg):
    return plan_memory(cfg, 4, 24, SHAPE, batch=50)


def test_what_is_counted_is_there(cfg, plan):
    model = build_model(cfg)
    inject(model, 'icon', bottleneck=16)
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    buffers = sum(b.nbytes for b in model.buffers())
    plain = way_of(plan, DDP, None)
    assert plain.weights_gib == pytest.approx((frozen + buffers) / GIB)
    assert plain.trained_gib == pytest.approx(5 * trained / GIB)
    assert plain.stored_gib == pytest.approx(cost_of(model, SHAPE).stored_mib / 1024)
    block = sum(p.nbytes for p in model.backbone.layers[0].parameters())
    rest = sum(p.nbytes for p in model.parameters()) - 4 * block
    sharded = way_of(plan, SHARDED, None)
    assert sharded.weights_gib == pytest.approx((frozen / 4 + 2 * block + rest + buffers) / GIB)


@pytest.mark.parametrize('frozen_dtype', ['int8', 'nf4'])
def test_packed_weights_have_the_bytes_that_packing_gives(cfg, plan, frozen_dtype):
    pytest.importorskip('torchao')
    model = build_model(cfg)
    inject(model, 'icon', bottleneck=16, frozen_dtype=frozen_dtype)
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()) if not t.requires_grad)
    assert way_of(plan, DDP, frozen_dtype).weights_gib == pytest.approx(held / GIB)


def test_each_saving_saves(plan):
    plain, half, recomputed = (way_of(plan, DDP, *o) for o in ((None,), ('bfloat16',), ('bfloat16', True)))
    assert half.weights_gib < plain.weights_gib and recomputed.stored_gib < half.stored_gib < plain.stored_gib
    assert way_of(plan, DDP, 'nf4').weights_gib < way_of(plan, DDP, 'int8').weights_gib < half.weights_gib
    assert recomputed.images > half.images > plain.images > 50
    assert plan.chosen == plain  # the simplest


def test_what_does_not_fit_is_told(cfg):
    one = plan_memory(cfg, 1, 1.2, SHAPE, batch=10**6)
    assert {way.strategy for way in one.ways} == {ONE} and one.chosen is None
    with pytest.raises(ValueError, match='at least one GPU, memory and images'):
        plan_memory(cfg, 0, 24)


def test_the_command(root, capsys):
    command = [str(root / DIGITS), '--shape', '28', '28']
    inspect_command.main([*command, '--gpus', '4', '--memory', '24', '--json'])
    output = capsys.readouterr().out  # libraries may print when they are imported
    content = json.loads(output[output.index('{') :])['plan']
    assert content['gpus'] == 4 and content['chosen'] == content['ways'][0] and content['batch'] == 50
    inspect_command.main([*command, '--memory', '24'])
    output = capsys.readouterr().out
    assert 'estimated memory on each of 1 GPUs of 24 GiB' in output and 'First that fits' in output
    with pytest.raises(SystemExit):
        inspect_command.main([*command, '--gpus', '4'])
    assert 'add --memory GIB' in capsys.readouterr().err
