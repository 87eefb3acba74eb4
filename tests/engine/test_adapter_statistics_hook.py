"""What the hook logs, against formulas on a copy of the model."""

import copy
import json

import pytest
import torch
import torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from tiny_runs import build

from iconformer_mm.engine import AdapterStatisticsHook

LAYERS = ('layers.0.adapter_attention', 'layers.1.adapter_attention')


def rms(values):
    return (values.square().sum() / values.numel()).sqrt()


class Reference(Hook):
    """Runs a copy of the model on each batch before the model does, and works out what should be logged."""

    priority = 'HIGH'

    def __init__(self, accumulative_counts=1):
        self.accumulative_counts = accumulative_counts
        self.iterations, self.gradients, self.hooks = [], [], []

    def before_train(self, runner):
        self.step = vars(runner.optim_wrapper.optimizer).get('step')

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        model = copy.deepcopy(runner.model)
        model.zero_grad()
        tokens, values = {}, {}
        for name in LAYERS:
            adapter = model.backbone.get_submodule(name)
            adapter.register_forward_hook(lambda m, args, out, name=name: tokens.update({name: (args[0], out)}))
        data = model.data_preprocessor(copy.deepcopy(data_batch), True)
        (model(**data, mode='loss')['loss'] / self.accumulative_counts).backward()
        for name, (x, delta) in tokens.items():
            adapter = model.backbone.get_submodule(name)
            z = x[:, 1:] @ adapter.down.weight.T + adapter.down.bias  # without the class token
            taps = (z.mean(dim=1) @ adapter.icon.generator.weight.T).view(len(x), -1, 9)
            centred = taps - taps.mean(dim=2, keepdim=True)
            normed = centred / ((centred**2).mean(dim=2, keepdim=True).sqrt() + adapter.icon.eps)
            kernels = normed * adapter.icon.gamma.flatten(1) + adapter.icon.beta.flatten(1)
            spread = ((kernels - kernels.mean(dim=0)) ** 2).mean(dim=0).sqrt().mean()
            norms = (kernels**2).sum(dim=2).sqrt().mean()
            values[name] = dict(kernel_spread=spread, kernel_norm=norms, adapter_ratio=rms(delta) / rms(x))
        self.iterations.append({n: {k: v.item() for k, v in each.items()} for n, each in values.items()})
        self.gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.hooks.append(sum(len(m._forward_hooks) for n, m in runner.model.named_modules() if 'adapter' in n))


def run(tmp_path, options, reference=None, **changes):
    hooks = [dict(type='PEFTHook', method=dict(type='icon', bottleneck=8))]
    changes.setdefault('custom_hooks', [*hooks, dict(type='AdapterStatisticsHook', **options)])
    runner = build(tmp_path, **changes)
    if reference is not None:
        runner.register_hook(reference)
    runner.train()
    return runner


def logged(runner):
    """The numbers of each scalar that is ours."""
    words = ('kernel_', 'adapter_', 'head_gradient')
    scalars = {n.removeprefix('train/'): b.data[0].tolist() for n, b in runner.message_hub.log_scalars.items()}
    return {n: values for n, values in scalars.items() if n.startswith(words)}


def total(gradients, part):
    return sum(g.square().sum() for n, g in gradients.items() if part in n).sqrt().item()


def test_values_by_hand(tmp_path):
    reference = Reference()
    runner = run(tmp_path, dict(interval=3), reference)
    actual = logged(runner)
    expected = [reference.iterations[i] for i in (2, 5)]  # of eight iterations
    for scalar in ('kernel_spread', 'kernel_norm', 'adapter_ratio'):
        for name in LAYERS:
            assert actual.pop(f'{scalar}/{name}') == pytest.approx([each[name][scalar] for each in expected], rel=1e-4)
        means = [sum(each[name][scalar] for name in LAYERS) / 2 for each in expected]
        assert actual.pop(f'{scalar}/mean') == pytest.approx(means, rel=1e-4) and min(means) > 0
    gradients = [reference.gradients[i] for i in (2, 5)]
    for name in LAYERS:
        norms = [total(each, name) for each in gradients]
        assert actual.pop(f'adapter_gradient/{name}') == pytest.approx(norms, rel=1e-4) and min(norms) > 0
    assert actual.pop('adapter_gradient/total') == pytest.approx(
        [total(each, 'adapter') for each in gradients], rel=1e-4
    )
    assert actual.pop('head_gradient') == pytest.approx([total(each, 'head.') for each in gradients], rel=1e-4)
    means = [sum(total(each, name) for name in LAYERS) / 2 for each in gradients]
    assert actual.pop('adapter_gradient/mean') == pytest.approx(means, rel=1e-4)
    assert not actual  # and nothing else


def test_it_is_there_at_the_interval_only(tmp_path):
    reference = Reference()  # which looks before the hook has gone
    runner = run(tmp_path, dict(interval=3, per_adapter=False), reference)
    assert [count > 0 for count in reference.hooks] == [False, False, True, False, False, True, False, False]
    assert set(logged(runner)) == {
        'kernel_spread/mean', 'kernel_norm/mean', 'adapter_ratio/mean', 'adapter_gradient/mean',
        'adapter_gradient/total', 'head_gradient',
    }  # fmt: skip
    hook = next(h for h in runner.hooks if isinstance(h, AdapterStatisticsHook))
    assert not hook._seen and not any(m._forward_hooks for n, m in runner.model.named_modules() if 'adapter' in n)
    assert vars(runner.optim_wrapper.optimizer).get('step') is reference.step
    assert hook._forget_step is None


def test_gradients_are_seen_after_something_was_compiled(tmp_path):
    """After which torch 2.1 calls no hooks of optimizers."""
    torch.compile(torch.sin, backend='eager')(torch.ones(1))
    assert len(logged(run(tmp_path, dict(interval=4)))['adapter_gradient/total']) == 2


def test_accumulated_gradients(tmp_path):
    """Of four steps of two batches; the third iteration is logged, its gradients with the fourth's step."""
    reference = Reference(accumulative_counts=2)
    runner = run(tmp_path, dict(interval=3), reference, **{'optim_wrapper.accumulative_counts': 2})
    actual = logged(runner)
    steps = [{n: a + b[n] for n, a in reference.gradients[i].items()} for i, b in ((2, reference.gradients[3]),)]
    steps.append({n: a + reference.gradients[5][n] for n, a in reference.gradients[4].items()})
    assert actual['adapter_gradient/total'] == pytest.approx([total(each, 'adapter') for each in steps], rel=1e-4)
    assert actual['head_gradient'] == pytest.approx([total(each, 'head.') for each in steps], rel=1e-4)
    ratios = [reference.iterations[i][LAYERS[0]]['adapter_ratio'] for i in (2, 5)]
    assert actual[f'adapter_ratio/{LAYERS[0]}'] == pytest.approx(ratios, rel=1e-4)


def test_training_is_as_without(tmp_path):
    """The same weights, also with recomputed blocks; and what is logged is the same."""
    plain = build(tmp_path / 'plain')
    plain.train()
    runners = []
    for with_cp in (False, True):
        peft = dict(type='PEFTHook', method=dict(type='icon', bottleneck=8), with_cp=with_cp)
        hooks = [peft, dict(type='AdapterStatisticsHook', interval=2)]
        runners.append(run(tmp_path / str(with_cp), {}, custom_hooks=hooks))
        for name, value in plain.model.state_dict().items():
            assert torch.equal(runners[-1].model.state_dict()[name], value), name
    first, second = map(logged, runners)
    assert first.keys() == second.keys() and len(first['kernel_norm/mean']) == 4
    for name, values in first.items():
        assert second[name] == pytest.approx(values, rel=1e-5), name


def test_in_a_distributed_wrapper(tmp_path, monkeypatch):
    monkeypatch.setenv('LOCAL_RANK', '0')
    alone = logged(run(tmp_path / 'alone', dict(interval=2)))
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        wrapper = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
        runner = run(tmp_path / 'ddp', dict(interval=2), launcher='pytorch', model_wrapper_cfg=wrapper)
        assert type(runner.model).__name__ == 'MMDistributedDataParallel'
        wrapped = logged(runner)
        del runner
    finally:
        dist.destroy_process_group()
    assert wrapped.keys() == alone.keys()
    for name, values in alone.items():
        assert wrapped[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize('method', ['icon-static', 'adaptformer', 'lora'])
def test_other_methods(method, tmp_path):
    hooks = [dict(type='PEFTHook', method=method), dict(type='AdapterStatisticsHook', interval=4)]
    actual = logged(run(tmp_path, {}, custom_hooks=hooks))
    assert min(actual['adapter_gradient/total']) > 0 and len(actual['head_gradient']) == 2
    assert ('adapter_ratio/mean' in actual) == (method != 'lora')
    assert ('kernel_norm/mean' in actual) == (method == 'icon-static')
    if method == 'icon-static':
        assert actual['kernel_spread/mean'] == pytest.approx([0, 0], abs=1e-6) and min(actual['kernel_norm/mean']) > 0


def test_the_logger_writes_it(tmp_path):
    backends = [dict(type='LocalVisBackend')]
    logger = dict(logger=dict(type='LoggerHook', interval=2))
    changes = dict(visualizer=dict(_delete_=True, type='Visualizer', vis_backends=backends), default_hooks=logger)
    runner = run(tmp_path, dict(interval=2), **changes)
    (file,) = tmp_path.glob('*/vis_data/scalars.json')
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if 'loss' in line]
    actual = logged(runner)
    for name in (f'kernel_spread/{LAYERS[0]}', 'adapter_gradient/total', 'head_gradient'):
        # Each line has the value of its own iteration, not a mean over several.
        assert [line[name] for line in lines] == pytest.approx(actual[name]) and len(set(actual[name])) == 4


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match='finds no adapters in the model: add a PEFTHook'):
        run(tmp_path, {}, custom_hooks=[dict(type='AdapterStatisticsHook')])
    with pytest.raises(ValueError, match='interval must be at least 1, got 0'):
        AdapterStatisticsHook(interval=0)


def test_optimizers_that_it_cannot_read(tmp_path):
    """Several of them, and one whose parameters ZeRO has flattened and split."""
    runner = run(tmp_path, {})
    hook, wrapper = AdapterStatisticsHook(), runner.optim_wrapper
    wrapper.optimizer.single_partition_of_fp32_groups = []  # as DeepSpeed's stages 1 and 2 have
    with pytest.raises(ValueError, match='reads whole gradients, which ZeRO splits'):
        hook.before_train(runner)
    runner.optim_wrapper = OptimWrapperDict(first=wrapper)
    with pytest.raises(ValueError, match='supports one optimizer, but there are several'):
        hook.before_train(runner)
