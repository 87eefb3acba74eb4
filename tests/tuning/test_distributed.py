"""Two processes give the gradients of one on the joint batch."""

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import FAMILIES, flatten, image, stir
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from iconformer_mm import inject


def build(method):
    torch.manual_seed(0)
    model = next(f for f in FAMILIES if f.name == 'ViT').build()
    inject(model, method)
    return stir(model).train()


def gradients(model, x):
    flatten(model(x))[0].square().mean().backward()
    return {n.removeprefix('module.'): p.grad for n, p in model.named_parameters() if p.grad is not None}


def gradients_of_a_part(rank: int, method: str, sharded: bool) -> dict[str, torch.Tensor]:
    part = image((64, 64), batch=4)[2 * rank : 2 * rank + 2]
    if not sharded:
        return gradients(DistributedDataParallel(build(method)), part)  # no find_unused_parameters
    model = FullyShardedDataParallel(build(method), use_orig_params=True, device_id=torch.device('cpu'))
    gradients(model, part)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        named = ((n.removeprefix('_fsdp_wrapped_module.'), p.grad) for n, p in model.named_parameters())
        return {n: grad.clone() for n, grad in named if 'adapter' in n}


def work(rank: int, folder: str, method: str, sharded: bool) -> None:
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    found = gradients_of_a_part(rank, method, sharded)
    if rank == 0:
        torch.save(found, f'{folder}/gradients.pt')
    # The wrapped model is gone by now; a process that left early would leave the other hanging.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def shards_on_a_cpu() -> bool:
    """Whether FSDP works here without a GPU; it asks for a stream with a priority, which torch 2.1 lacks on a CPU."""
    try:
        torch.cpu.Stream(priority=-1)
    except TypeError:
        return False
    return True


fsdp = pytest.mark.skipif(not shards_on_a_cpu(), reason='FSDP of this torch needs a GPU')


@pytest.mark.parametrize('sharded', [False, pytest.param(True, marks=fsdp)], ids=['DDP', 'FSDP'])
@pytest.mark.parametrize('method', ['icon', 'lora', 'adapter', 'vpt'])
def test_gradients_of_the_joint_batch(method, sharded, tmp_path):
    mp.start_processes(work, args=(str(tmp_path), method, sharded), nprocs=2, start_method='forkserver')
    actual = torch.load(tmp_path / 'gradients.pt', weights_only=True)
    expected = gradients(build(method), image((64, 64), batch=4))
    assert actual.keys() == expected.keys() and all('adapter' in name for name in actual)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, atol=1e-7, rtol=1e-4, msg=name)


def test_a_wrapped_model_is_refused(tmp_path):
    from mmengine.model import MMDistributedDataParallel

    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = next(f for f in FAMILIES if f.name == 'ViT').build()
        with pytest.raises(ValueError, match='inject into the bare model, then wrap it'):
            inject(MMDistributedDataParallel(model, device_ids=None))
    finally:
        dist.destroy_process_group()
