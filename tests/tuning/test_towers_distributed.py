"""Two processes give a detector with several towers the gradients of one on the joint batch."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from tower_models import MODELS, build, data, wake

from iconformer_mm import inject

NAME = 'Deformable DETR'  # draws no noise


def make(freeze):
    kind, model = MODELS[NAME], build(NAME)
    methods = [dict(where='backbone', type='icon', bottleneck=4), dict(where=list(kind.towers), type='lora', rank=2)]
    inject(model, methods=methods, freeze=freeze)
    wake(model)
    return model.train()


def step(model, bare, batch):
    """Gradients of one step, by the names in the bare model."""
    prepared = bare.data_preprocessor(batch, True)
    total, _ = bare.parse_losses(model(**prepared, mode='loss'))
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in bare.named_parameters() if p.requires_grad}


def only(batch, number):
    return {key: values[number : number + 1] for key, values in batch.items()}


def work(rank: int, folder: str, freeze: list[str]) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    bare = make(freeze)
    model = DistributedDataParallel(bare)  # no find_unused_parameters
    first = step(model, bare, only(data(NAME), rank))
    step(model, bare, only(data(NAME), rank))  # fails if the first has left parameters out
    if rank == 0:
        torch.save(first, f'{folder}/gradients.pt')
    del model, bare
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize('freeze', [['*'], ['neck']], ids=['towers alone', 'with the head'])
def test_gradients_of_the_joint_batch(freeze, tmp_path):
    mp.start_processes(work, args=(str(tmp_path), freeze), nprocs=2, start_method='forkserver')
    found = torch.load(tmp_path / 'gradients.pt', weights_only=True)
    model = make(freeze)
    expected = step(model, model, data(NAME))
    assert found.keys() == expected.keys()
    for path in (*MODELS[NAME].all_towers, *(() if freeze == ['*'] else ('bbox_head',))):
        assert any(name.startswith(f'{path}.') for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
