"""Runs over a base in 8 or 4 bits: checkpoints, resuming, averages, several processes, prediction."""

import gc
import logging

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import FAMILIES, flatten, image, stir
from mmengine.registry import MODELS, init_default_scope
from tiny_runs import build, config
from torch.nn.parallel import DistributedDataParallel
from trained_adapters import DIGITS, digit, trained

from iconformer_mm import inject, load_adapter, save_adapter
from iconformer_mm.checkpoint import load_safetensors, read_adapter
from iconformer_mm.engine import add_peft, build_runner, load_config
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.tuning.accounting import WeightsError
from iconformer_mm.tuning.quantised_weight import held_weights

pytest.importorskip('torchao', reason='the original stack has none; test_frozen_precision has its message')


def hook(kind):
    return [dict(type='PEFTHook', method=dict(type='icon', bottleneck=8), frozen_dtype=kind)]


def equal(first, second):
    one, other = first.model.state_dict(), second.model.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    whole = build(tmp_path / 'whole', custom_hooks=hook('nf4'))
    whole.train()
    assert len(dict(held_weights(whole.model))) == 8
    state = torch.load(tmp_path / 'whole' / 'epoch_1.pth', weights_only=False)['state_dict']
    assert state['backbone.layers.0.attn.qkv.weight'].dtype == torch.uint8
    first = str(tmp_path / 'whole' / 'epoch_1.pth')
    second = build(tmp_path / 'part', resume=True, load_from=first, custom_hooks=hook('nf4'))
    second.train()
    assert equal(whole, second)
    files = [read_adapter(tmp_path / run / 'adapter.safetensors')[0] for run in ('whole', 'part')]
    assert files[0]['base_fingerprint'] == files[1]['base_fingerprint'] and files[0]['base_dtype'] == 'nf4'

    # The same checkpoint, in a test and over another precision.
    last = str(tmp_path / 'whole' / 'epoch_2.pth')
    assert build(tmp_path / 'test', load_from=last, custom_hooks=hook('nf4')).test() == whole.test()
    for kind in ('int8', None):
        with pytest.raises(WeightsError, match="hold the base in nf4, .*frozen_dtype='nf4'"):
            build(tmp_path / str(kind), load_from=last, custom_hooks=hook(kind)).test()


@pytest.mark.filterwarnings('ignore')
def test_adapter_checkpoints_and_averages(tmp_path):
    """They hold no base, so they are resumed over any precision: the same exactly, another with a warning."""
    own = dict(
        default_hooks=dict(checkpoint=dict(type='AdapterCheckpointHook', interval=1)),
        custom_hooks=[*hook('int8'), dict(type='EMAHook', momentum=0.1)],
    )
    init_default_scope('mmpretrain')
    torch.save(MODELS.build(config(tmp_path).model).backbone.state_dict(), tmp_path / 'base.pth')
    pretrained = dict(type='Pretrained', checkpoint=str(tmp_path / 'base.pth'))
    runs = {}
    for name in ('whole', 'part', 'other'):
        cfg = config(tmp_path / name)
        cfg.merge_from_dict({**own, 'model.backbone.init_cfg': pretrained})
        if name != 'whole':
            cfg.merge_from_dict(dict(resume=True, load_from=str(tmp_path / 'whole' / 'epoch_1.safetensors')))
        if name == 'other':
            cfg.custom_hooks[0].frozen_dtype = 'nf4'
        cfg.experiment_name = f'quantised {name}'
        runs[name] = build_runner(cfg)
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, said=said: said.append(record.getMessage())
        runs[name].logger.addHandler(handler)  # each run has its own
        runs[name].train()
        words = 'was trained over a base in int8, and the model has a base in nf4'
        assert (words in ' '.join(said)) == (name == 'other')
    assert equal(runs['whole'], runs['part']) and not equal(runs['whole'], runs['other'])
    average = next(h for h in runs['whole'].hooks if type(h).__name__ == 'EMAHook').ema_model
    assert len(dict(held_weights(average.module))) == 8
    kept = load_safetensors(str(tmp_path / 'whole' / 'epoch_2.safetensors'))['state_dict']
    assert all('adapter' in name or name.startswith('head.') for name in kept)


def adapted():
    torch.manual_seed(0)
    model = next(f for f in FAMILIES if f.name == 'ViT').build()
    inject(model, frozen_dtype='int8')
    return stir(model).train()


def gradients(model, x):
    flatten(model(x))[0].square().mean().backward()
    return {n.removeprefix('module.'): p.grad for n, p in model.named_parameters() if p.grad is not None}


def work(rank: int, folder: str) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    model = adapted()
    if rank == 1:
        for _, weight in held_weights(model):
            weight.packed[200:].zero_()  # the wrapper gives all processes the base of the first
    wrapped = DistributedDataParallel(model)
    found = gradients(wrapped, image((64, 64), batch=4)[2 * rank : 2 * rank + 2])
    if rank == 0:
        torch.save(found, f'{folder}/gradients.pt')
    del wrapped
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_give_the_gradients_of_one(tmp_path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method='forkserver')
    actual = torch.load(tmp_path / 'gradients.pt')
    expected = gradients(adapted(), image((64, 64), batch=4))
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert (actual[name] - grad).norm() <= 0.05 * grad.norm() + 1e-7, name


def predict(config, file, **options):
    init_default_scope('mmpretrain')
    return AdapterInferencer(config, file, device='cpu', **options)(digit())[0].pred_score


def test_prediction(root, tmp_path, logged):
    """Over the precision of the training, exactly; over another, with a warning."""
    trained(root, DIGITS, tmp_path / 'full.safetensors')
    cfg = load_config(str(root / DIGITS))
    model = MODELS.build(cfg.model)
    model.init_weights()
    load_adapter(model, tmp_path / 'full.safetensors', frozen_dtype='int8')
    assert 'was trained over a base in full precision, and the model has a base in int8' in ' '.join(logged)
    save_adapter(model, tmp_path / 'int8.safetensors')
    model.eval()
    with torch.no_grad():
        data = model.data_preprocessor(dict(inputs=[torch.from_numpy(digit())[None]]))
        expected = model(**data, mode='predict')[0].pred_score

    logged.clear()
    torch.testing.assert_close(predict(cfg, tmp_path / 'int8.safetensors', frozen_dtype='int8'), expected)
    add_peft(cfg, 'icon')
    cfg.default_hooks.peft.frozen_dtype = 'int8'  # as in the training's config
    torch.testing.assert_close(predict(cfg, tmp_path / 'int8.safetensors'), expected)
    assert 'was trained over' not in ' '.join(logged)
    other = predict(cfg, tmp_path / 'int8.safetensors', frozen_dtype='nf4')
    assert 'was trained over a base in int8, and the model has a base in nf4' in ' '.join(logged)
    assert not torch.equal(other, expected)
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        predict(cfg, tmp_path / 'int8.safetensors', frozen_dtype='int4')
