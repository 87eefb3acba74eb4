"""The forward pass writes nothing: threads, switches, copies and calls of any form."""

import copy
import pickle
import threading

import pytest
import torch
from families import FAMILIES, VIT, flatten, image, stir
from torch import nn

from iconformer_mm import (
    add_adapter,
    disabled,
    inject,
    list_adapters,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_adapter,
    summarize,
    unmerge,
)
from iconformer_mm.adapters import HoulsbyAdapter
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.replacement import with_values

METHODS = [m for m in PEFT_METHODS.module_dict if m != 'full']
HOSTS = ['ViT', 'Swin', 'timm ViT']
by_name = {family.name: family for family in FAMILIES}
each_host = pytest.mark.parametrize('host', HOSTS)


def adapted(host: str, method: str) -> nn.Module:
    torch.manual_seed(0)
    model = by_name[host].build()
    inject(model, method)
    stir(model)
    model.eval()
    return model


def run(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return flatten(model(x))


def same(left, right) -> bool:
    return len(left) == len(right) > 0 and all(torch.equal(a, b) for a, b in zip(left, right))


def in_threads(work, count: int = 4) -> None:
    """Run a function in threads, and raise what one of them raises."""
    errors = []

    def guarded(index: int) -> None:
        try:
            work(index)
        except BaseException as error:  # whatever it is, the test fails
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@each_host
@pytest.mark.parametrize('method', METHODS)
def test_threads_share_a_model(host, method):
    """Images of different sizes in each thread: every output is what a single thread computes, the base untouched."""
    if method == 'vpt' and host == 'Swin':
        pytest.skip('prompt tokens are for plain ViTs')
    model = adapted(host, method)
    sizes = by_name[host].sizes
    inputs = [image(sizes[i % len(sizes)], batch=1, seed=i) for i in range(4)]
    expected = [run(model, x) for x in inputs]
    state = {n: t.clone() for n, t in model.state_dict().items()}
    kinds = {n: type(p) for n, p in model.named_parameters()}

    def work(index: int) -> None:
        for _ in range(8):
            assert same(run(model, inputs[index]), expected[index])

    in_threads(work)
    assert {n: type(p) for n, p in model.named_parameters()} == kinds
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize('method', ['icon', 'lora', 'ssf', 'vpt'])
def test_threads_train_and_disable_on_their_own(method):
    """One thread takes gradients while another runs the base."""
    model = adapted('ViT', method)
    x = image((64, 64))
    with disabled(model):
        base = run(model, x)

    def gradients():
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = sum(t.square().mean() for t in flatten(model(x)))
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    expected = gradients()

    def work(index: int) -> None:
        for _ in range(6):
            if index % 2:
                with disabled(model):
                    assert same(run(model, x), base)
            else:
                for found, wanted in zip(gradients(), expected):
                    assert (found is None) == (wanted is None)
                    if found is not None:
                        torch.testing.assert_close(found, wanted)

    in_threads(work)


@pytest.mark.parametrize('method', METHODS)
def test_a_forward_pass_leaves_every_module_as_it_was(method):
    model = adapted('timm ViT', method)
    run(model, image((64, 64)))

    def snapshot():
        return {
            name: {key: (id(value), type(value)) for key, value in vars(module).items()}
            | {key: id(value) for key, value in module._parameters.items()}
            for name, module in model.named_modules()
        }

    before, pickled = snapshot(), pickle.dumps(model)
    run(model, image((48, 80)))
    assert snapshot() == before and pickle.dumps(model) == pickled


@each_host
@pytest.mark.parametrize('method', ['icon', 'lora', 'bitfit'])
def test_a_block_is_pickled_without_its_backbone(host, method):
    model = adapted(host, method)
    block = get_injection(model).attachments[0].module
    inside = sum(t.numel() for t in block.state_dict().values())
    whole = sum(t.numel() for t in model.state_dict().values())
    kept = pickle.loads(pickle.dumps(block))
    assert sum(t.numel() for t in kept.state_dict().values()) == inside < whole
    found = {id(o): o for o in _reachable(block) if isinstance(o, nn.Module)}
    assert id(model) not in found and not any(m is model for m in found.values())


def _reachable(root):
    """All objects that pickling a module would take along."""
    seen, waiting = {}, [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (torch.Tensor, type, str, int, float)):
            continue
        seen[id(item)] = item
        waiting += list(vars(item).values()) if hasattr(item, '__dict__') else []
        waiting += list(item.values()) if isinstance(item, dict) else []
        waiting += list(item) if isinstance(item, (list, tuple, set, dict)) else []
        if hasattr(item, '__self__'):
            waiting.append(item.__self__)
    return seen.values()


def test_inactive_adapters_follow_the_model():
    model = adapted('ViT', 'icon')
    add_adapter(model, 'v1.0', 'adaptformer', bottleneck=4)
    add_adapter(model, 'low%', 'lora')
    assert list_adapters(model) == ['default', 'v1.0', 'low%']
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert any('adapter__v1%2E0' in name for name in model.state_dict())
    for name in ('low%', 'v1.0', 'default'):
        set_adapter(model, name)
        out = run(model, image((64, 64)).double())
        assert out[0].dtype == torch.float64
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            f'{path}.{n}' for path, module in _registered(model, name) for n, _ in module.named_parameters()
        }


def _registered(model, name):
    suffix = get_injection(model).adapters[name].attachments[0].suffix
    for attachment in get_injection(model).adapters[name].attachments:
        for key in attachment.adapters:
            yield f'{attachment.name}.{key}{suffix}', getattr(attachment.module, key + suffix)


def test_disabling_touches_nothing_and_allows_everything(tmp_path):
    model = adapted('ViT', 'icon')
    base = copy.deepcopy(model)
    remove(base)
    x = image((64, 64))
    keys, modes = list(model.state_dict()), [m.training for m in model.modules()]
    with disabled(model):
        assert list(model.state_dict()) == keys and [m.training for m in model.modules()] == modes
        assert same(run(model, x), run(base.eval() or base, x))
        save_adapter(model, tmp_path / 'a.safetensors')
        model.double()
        model.float()
        model.train()
        assert summarize(model).method == 'icon'
    model.eval()
    expected = run(model, x)
    with disabled(model):
        remove(model)
        assert same(run(model, x), run(base, x))
    load_adapter(model, tmp_path / 'a.safetensors')
    assert same(run(model.eval() or model, x), expected)


def test_what_ran_disabled_is_recomputed_disabled():
    """The backward pass with gradient checkpointing comes after `disabled`, or within it."""
    torch.manual_seed(0)
    model = by_name['Swin'].build_with_cp()
    inject(model)
    stir(model).eval()
    x = image((64, 64)).requires_grad_()
    plain = by_name['Swin'].build()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if 'adapter' not in n})
    plain.eval()
    y = x.detach().clone().requires_grad_()
    flatten(plain(y))[-1].square().sum().backward()
    with disabled(model):
        out = flatten(model(x))[-1]
    out.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize('method', ['icon', 'lora'])
def test_compiled_code_obeys_disabling_and_switching(method):
    """Also where another thread is within `disabled`, and where it was compiled within it."""
    torch._dynamo.reset()
    model = adapted('ViT', method)
    x = image((64, 64))
    with disabled(model):
        base = run(model, x)
    add_adapter(model, 'second', method)
    stir(model, seed=2)
    expected = {}
    for name in ('default', 'second'):
        set_adapter(model, name)
        expected[name] = run(model.eval(), x)

    compiled = torch.compile(model, backend='eager')

    def gives(wanted: list[torch.Tensor]) -> bool:
        outs = [torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(run(compiled, x), wanted)]
        return len(outs) > 0 and all(outs)

    with disabled(model):
        assert gives(base) and not gives(expected['default'])
    for name in ('default', 'second', 'default'):
        set_adapter(model, name)
        assert gives(expected[name]) and not gives(base)
        with disabled(model):
            assert gives(base)

    inside, done = threading.Event(), threading.Event()
    seen = []

    def disable() -> None:
        with disabled(model):
            inside.set()
            done.wait(60)
            seen.append(gives(base))

    thread = threading.Thread(target=disable)
    thread.start()
    inside.wait(60)
    here = gives(expected['default'])
    done.set()
    thread.join()
    assert here and seen == [True]


@pytest.mark.parametrize('method', METHODS)
def test_a_block_called_by_keyword(method):
    """As CAE calls its layers."""
    model = adapted('ViT', method)
    x = image((64, 64))
    expected = run(model, x)

    class ByKeyword(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x=x)

    for index, layer in enumerate(model.layers):
        model.layers[index] = ByKeyword(layer)
    assert same(run(model, x), expected)


@pytest.mark.parametrize('name', ['MAE', 'MILAN', 'MFF'])
def test_masked_pretraining(name):
    """Dropped tokens do not matter to methods without a grid; the others are refused before the first step."""
    from mmpretrain.registry import MODELS

    backbone = dict(type=f'{name}ViT', arch=VIT, img_size=64, patch_size=16)
    if name == 'MFF':
        backbone.update(out_indices=[0, 1])
    if name == 'MILAN':
        pytest.importorskip('mmpretrain.models.selfsup.milan')
    host = MODELS.build(backbone)

    class Pretraining(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = host

    model = Pretraining()
    for method in ('icon', 'convpass', 'mona'):
        with pytest.raises(ValueError, match='drops tokens of its'):
            inject(model, method)
    for method in ('adaptformer', 'adapter', 'lorand', 'lora', 'dora', 'ssf', 'bitfit', 'norm', 'vpt'):
        inject(model, method)
        x = image((64, 64))
        out = host(x, torch.rand(2, 16)) if name == 'MILAN' else host(x, True)
        flatten(out[0])[0].sum().backward()
        assert any(p.grad is not None for n, p in model.named_parameters() if 'adapter' in n), method
        remove(model)


@pytest.mark.parametrize(
    ('host', 'ends'),
    [
        ('ViT', ('attn', 'ffn.dropout_layer')),
        ('Swin', ('attn', 'ffn.dropout_layer')),
        ('timm ViT', ('drop_path1', 'drop_path2')),
        ('timm Swin', ('drop_path1', 'drop_path2')),
        ('mmseg ViT', ('attn.dropout_layer', 'ffn.dropout_layer')),
        ('mmdet PVT', ('attn.dropout_layer', 'ffn.dropout_layer')),
        ('SwinV2', ('norm1', 'norm2')),
        ('BEiT', ('drop_path', 'drop_path')),
    ],
)
@pytest.mark.parametrize('method', ['adapter', 'lorand'])
def test_adapters_after_a_branch_read_its_own_output(host, ends, method):
    """To the last bit, with a residual stream that swallows the branch; in bfloat16, where the host runs in that."""
    dtype = torch.float32 if host in ('Swin', 'SwinV2') else torch.bfloat16
    torch.manual_seed(0)
    model = by_name[host].build()
    inject(model, method)
    model.to(dtype).eval()
    attachment = get_injection(model).attachments[0]
    block, read, ended = attachment.module, [], []
    for key in ('adapter_attention', 'adapter'):
        attachment.part(key).register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for name in dict.fromkeys(ends):
        block.get_submodule(name).register_forward_hook(lambda module, args, out: ended.append(out))
    block.register_forward_pre_hook(lambda module, args: (args[0] + 500, *args[1:]))
    with torch.no_grad():
        model(image(by_name[host].sizes[0], batch=1).to(dtype))
    assert len(read) == len(ended) == 2
    for tokens, out in zip(read, ended):
        assert torch.equal(tokens, out.flatten(1, -2)) and out.float().std() > 0


@pytest.mark.parametrize('method', ['lora', 'dora'])
def test_low_rank_paths_are_not_rounded_into_weights(method):
    """With frozen bfloat16 matrices the change of a layer's output is that of single precision, within 1 %."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    from iconformer_mm.adapters import DoRAAdapter, LoRAAdapter, Target

    adapter = (LoRAAdapter if method == 'lora' else DoRAAdapter)([Target('fc.weight', 'fc1', (0, 64), 64)], 8, 8)
    with torch.no_grad():
        product = adapter.b['fc1'].normal_() @ adapter.a['fc1']
        adapter.b['fc1'].mul_(0.01 * layer.weight.norm() / product.norm())
        layer.weight.copy_(layer.weight.bfloat16())
    x = torch.randn(256, 64)
    out = layer(x)
    exact = adapter.double().add_path('fc.weight', layer.double(), x.double(), out.double()) - out.double()
    adapter.float()
    held = nn.Linear(64, 64)
    held.weight.data, held.bias.data = layer.weight.data.bfloat16(), layer.bias.data.float()
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        path = adapter.add_path(
            'fc.weight', held, x, torch.zeros(256, 64) if method == 'lora' else out.float()
        ).double()
    found = path if method == 'lora' else path - out.double()
    assert float((found - exact).norm() / exact.norm()) < 0.01


def test_dropout_and_rank_stabilisation_of_low_rank_paths():
    """Against the formula, W x + s B A drop(x)."""
    model = adapted('timm ViT', 'icon')
    remove(model)
    inject(model, dict(type='lora', rank=4, alpha=2, dropout=0.5, rank_stabilized=True, targets=['fc1']))
    stir(model)
    block = get_injection(model).attachments[0].module
    adapter, layer, x = block.adapter, block.mlp.fc1, torch.randn(3, 5, 32)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    wanted = layer.weight @ x.transpose(1, 2) + layer.bias[:, None]
    wanted = wanted + 2 / 4**0.5 * (adapter.b['fc1'] @ adapter.a['fc1'] @ dropped.transpose(1, 2))
    model.train()
    torch.manual_seed(3)
    found = adapter.add_path('mlp.fc1.weight', layer, x, layer(x))
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    with pytest.raises(ValueError, match='dropout cannot be applied'):
        inject(by_name['BEiT'].build(), 'lora', dropout=0.1)


def test_prompt_dropout_is_drawn_for_each_sample():
    model = adapted('ViT', 'icon')
    remove(model)
    inject(model, 'vpt', dropout=0.5)
    prompts = get_injection(model).attachments[0].part('adapter').train()(2)
    assert not torch.equal(prompts[0] == 0, prompts[1] == 0)


@pytest.mark.parametrize('method', ['lora', 'dora', 'ssf', 'bitfit', 'norm', 'partial'])
def test_merging_can_be_undone(method):
    model = adapted('ViT', method)
    x, keys = image((64, 64)), list(model.state_dict())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    expected = run(model, x)
    merge(model)
    assert not any('adapter' in name for name in model.state_dict())
    for a, b in zip(run(model.eval() or model, x), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    unmerge(model)
    model.eval()
    assert list(model.state_dict()) == keys and all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert same(run(model, x), expected)
    with pytest.raises(ValueError, match='no adapter was merged'):
        unmerge(model)
    merge(model, keep_base=False)
    with pytest.raises(ValueError, match='keep_base=False'):
        unmerge(model)


@pytest.mark.parametrize('change', ['load', 'train', 'cast'])
def test_weights_changed_after_merging_are_not_unmerged(change):
    model = adapted('ViT', 'lora')
    merge(model)
    if change == 'load':
        model.load_state_dict(by_name['ViT'].build().state_dict())
    elif change == 'train':
        model.cls_token.data += 1e-3
    else:
        model.half()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match='have changed since the merge'):
        unmerge(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_merging_refuses_what_diverged():
    model = adapted('ViT', 'lora')
    with torch.no_grad():
        get_injection(model).attachments[1].part('adapter').b['q'][0, 0] = float('nan')
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(
        ValueError, match="NaN or infinity into layers.1.attn.qkv.weight: the adapter 'default' diverged"
    ):
        merge(model)
    assert all(torch.equal(t, before[n]) or t.isnan().any() for n, t in model.state_dict().items())
    merge(model, safe=False)
    assert model.layers[1].attn.qkv.weight.isnan().any()


def test_views_share_everything_but_the_parameters():
    layer = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    other = torch.zeros(3, 2)
    view = with_values(layer, {'0.weight': other})
    assert view[0].weight is other and view[0].bias is layer[0].bias and view[1] is layer[1]
    assert layer[0].weight is not other and list(layer.state_dict()) == list(view.state_dict())
    layer[0].forward = lambda x: x
    with pytest.raises(RuntimeError, match='the forward of a Linear was replaced on the instance'):
        with_values(layer, {'0.weight': other})


def test_gradient_checkpointing_that_would_lose_adapters_is_an_error():
    model = by_name['Swin'].build()
    inject(model)
    model.stages[0].blocks[0].with_cp = True
    with pytest.raises(RuntimeError, match='with_cp of a SwinBlock was set after the injection'):
        model(image((64, 64)))


def test_checkpointing_of_timm_is_switched_after_the_injection():
    """The gradients are those without, for two sizes before the backward pass."""
    gradients = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = by_name['timm ViT'].build()
        inject(model)
        stir(model).train()
        if enable:
            model.timm_model.set_grad_checkpointing(True)
        calls = []
        model.timm_model.blocks[0].attn.register_forward_pre_hook(lambda *args, calls=calls: calls.append(1))
        losses = [sum(t.square().mean() for t in flatten(model(image(size)))) for size in ((64, 64), (48, 80))]
        sum(losses).backward()
        assert len(calls) == (4 if enable else 2)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        model.timm_model.set_grad_checkpointing(False)
        assert not model.timm_model.grad_checkpointing
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_an_adapter_that_needs_no_grid_says_so():
    assert not HoulsbyAdapter.needs_grid
    assert HoulsbyAdapter(8, bottleneck=2)(torch.rand(2, 5, 8), None).shape == (2, 5, 8)


class KeepsAList(nn.Module):
    """Calls its child from a list, where it is kept a second time."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(2, 2)
        self.kept = [self.child]

    def forward(self, x):
        return self.kept[0](x)


@pytest.mark.parametrize('path', ['child', '0.child'])
def test_a_view_replaces_modules_that_are_called_from_a_list(path):
    host = KeepsAList() if path == 'child' else nn.Sequential(KeepsAList())
    other, x = nn.Linear(2, 2), torch.randn(3, 2)
    expected = host(x)
    assert torch.equal(with_values(host, {path: other})(x), other(x))
    assert torch.equal(host(x), expected)
