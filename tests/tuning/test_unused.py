"""Blocks after the last output are known, and distributed training on them is refused before it begins."""

import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from families import SWIN, VIT, flatten, image
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmpretrain.models import build_backbone
from torch import nn

from iconformer_mm import inject, remove
from iconformer_mm.analysis.inspection import inspect_model
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.unused import find_unused_blocks, unused_adapters

HOSTS = [
    dict(type='VisionTransformer', arch={**VIT, 'num_layers': 4}, img_size=64, out_type='raw', out_indices=1),
    dict(type='VisionTransformer', arch={**VIT, 'num_layers': 4}, img_size=64, out_type='raw', out_indices=[0, -2]),
    dict(type='VisionTransformer', arch={**VIT, 'num_layers': 4}, img_size=64, out_type='raw'),
    dict(type='SwinTransformer', arch=SWIN, img_size=64, pad_small_map=True, out_indices=(0, 2)),
    dict(type='SwinTransformer', arch=SWIN, img_size=64, pad_small_map=True),
    dict(type='mmseg.MixVisionTransformer', embed_dims=8, num_layers=[1] * 4, num_heads=[1, 2, 4, 8], out_indices=(1,)),
    dict(type='mmdet.SwinTransformer', embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], out_indices=(0, 1)),
    dict(type='mmseg.VisionTransformer', img_size=64, embed_dims=32, num_layers=3, num_heads=2, out_indices=(0,)),
]


def test_they_are_those_without_a_gradient():
    """By autograd, which knows nothing of out_indices."""
    counts = []
    for host in HOSTS:
        torch.manual_seed(0)
        backbone = build_backbone(dict(host))
        inject(backbone, 'adaptformer')
        attachments = get_injection(backbone).attachments
        loss = sum(out.square().mean() for out in flatten(list(backbone(image((64, 64))))))
        expected = []
        for attachment in attachments:
            parameters = [p for adapter in attachment.adapters.values() for p in adapter.parameters()]
            grads = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
            if all(grad is None for grad in grads):
                expected.append(attachment.name)
        found = find_unused_blocks(backbone, [attachment.name for attachment in attachments])
        assert found == expected, host
        assert bool(unused_adapters(backbone)) == bool(expected)
        counts.append(len(expected))
    assert counts == [2, 1, 0, 1, 0, 2, 3, 2]


def test_of_several_backbones_all_are_looked_at():
    init_default_scope('mmpretrain')
    model = nn.ModuleDict({name: build_backbone(dict(HOSTS[i])) for name, i in (('rgb', 2), ('depth', 0))})
    inject(model, 'adaptformer', backbones=['rgb', 'depth'])
    assert '2 adapted blocks, depth.layers.2 to depth.layers.3, come' in unused_adapters(model)
    remove(model)
    assert unused_adapters(model) is None
    inject(model, 'adaptformer', backbones=['rgb', 'depth'], blocks='first:2')
    assert unused_adapters(model) is None


def config(out_indices, **options):
    backbone = dict(HOSTS[0], out_type='cls_token', out_indices=out_indices, in_channels=1, img_size=32, patch_size=8)
    backbone['init_cfg'] = dict(type='Pretrained', checkpoint='a.pth')
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(
                type='ImageClassifier',
                data_preprocessor=dict(mean=[0.0], std=[255.0]),
                backbone=backbone,
                head=dict(type='LinearClsHead', num_classes=4, in_channels=32),
            ),
            custom_hooks=[dict(type='PEFTHook', method='adaptformer', save_adapter=False)],
            train_dataloader=dict(
                batch_size=5,
                num_workers=0,
                dataset=dict(
                    type='Strokes', num_images=20, num_classes=4, image_size=32, pipeline=[dict(type='PackInputs')]
                ),
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            train_cfg=dict(by_epoch=False, max_iters=2),
            optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3)),
            default_hooks=dict(checkpoint=None),
            launcher='pytorch',
            log_level='ERROR',
            visualizer=None,
            **options,
        )
    )


def test_they_are_told_of_by_the_inspection():
    (mistake,) = inspect_model(config([1]), (32, 32)).mistakes
    assert mistake.startswith('2 adapted blocks, layers.2 to layers.3, come after the last of out_indices')
    assert inspect_model(config([3]), (32, 32)).mistakes == []


def outcome(cfg, folder, name):
    from iconformer_mm.engine import build_runner

    cfg.model.backbone.init_cfg = None
    cfg.update(work_dir=f'{folder}/{name}', experiment_name=name)
    try:
        build_runner(cfg).train()
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    return 'trained'


def work(rank: int, folder: str) -> None:
    import iconformer_mm.analysis.inspection  # noqa: F401
    from iconformer_mm.engine import runner

    torch.set_num_threads(1)
    os.environ['LOCAL_RANK'] = str(rank)
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    results = dict(
        used=outcome(config([3]), folder, 'used'),
        unused=outcome(config([1]), folder, 'unused'),
        waited=outcome(config([1], find_unused_parameters=True), folder, 'waited'),
    )
    runner.unused_adapters = lambda *args: None  # as on a host that it does not know
    results['unknown'] = outcome(config([1]), folder, 'unknown')
    if rank == 0:
        torch.save(results, f'{folder}/results.pt')
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    mp.start_processes(work, args=(str(tmp_path),), nprocs=2, start_method='forkserver')
    results = torch.load(tmp_path / 'results.pt')
    assert results['used'] == results['waited'] == 'trained'
    assert results['unused'].startswith('ValueError: 2 adapted blocks, layers.2 to layers.3, come after the last')
    assert 'set find_unused_parameters=True' in results['unused']
    assert (
        results['unknown'].startswith('RuntimeError: ') and 'trained parameters got no gradient' in results['unknown']
    )
    assert 'backbone.layers.2.adapter' in results['unknown']
