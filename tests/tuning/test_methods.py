"""Every PEFT method: the invariants on every block family, and what it computes against the plain statement of it."""

import copy

import pytest
import torch
from families import FAMILIES, SWIN, VIT, flatten, image, stir
from torch import nn

from iconformer_mm import (
    add_adapter,
    disabled,
    inject,
    load_adapter,
    merge,
    remove,
    save_adapter,
    set_adapter,
    summarize,
)
from iconformer_mm.adapters import TokenGrid
from iconformer_mm.registry import PEFT_METHODS
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.methods.weights import ROLES

MERGEABLE = ('lora', 'dora', 'ssf', 'bitfit', 'norm', 'partial')
STARTS_ELSEWHERE = ('ssf', 'mona', 'vpt')  # by their papers; all others start at the pre-trained model
METHODS = sorted(set(PEFT_METHODS.module_dict) - {'full', 'frozen'})
NO_PROMPTS = ('BEiT', 'EVA-02', 'MAE', 'SAM', 'Swin', 'PVT', 'MiT', 'Twins')

each_family = pytest.mark.parametrize('family', FAMILIES, ids=str)
each_method = pytest.mark.parametrize('method', METHODS)


def defined(method, family):
    """Where a method has a meaning: the table in docs/methods.md."""
    return method != 'vpt' or not any(word in family.name for word in NO_PROMPTS)


def run(model, x):
    with torch.no_grad():
        return flatten(model(x))


def close(left, right, atol=1e-5, rtol=1e-4):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def make(build):
    """Build a backbone whose biases are not zero and whose norms are not one (or, in timm's SwinV2, zero)."""
    torch.manual_seed(0)
    model = build()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.eval()  # which of some backbones returns nothing
    return model


def make_vit():
    from mmpretrain.models.backbones import VisionTransformer

    return make(lambda: VisionTransformer(arch=VIT, img_size=64, out_type='raw'))


def make_swin():
    from mmpretrain.models.backbones import SwinTransformer

    return make(lambda: SwinTransformer(arch=SWIN, img_size=64, pad_small_map=True))


@each_family
@each_method
def test_invariants(method, family):
    """Start, gradients, frozen weights, removal; an error that leaves no trace where a method is not defined."""
    model = make(family.build)
    model.requires_grad_(False)
    keys = list(model.state_dict())
    x = image(family.sizes[-1])
    before = run(model, x)
    if not defined(method, family):
        with pytest.raises(ValueError, match='take no prompt tokens'):
            inject(model, method)
        assert list(model.state_dict()) == keys and 'forward' not in vars(model)
        assert all(torch.equal(a, b) for a, b in zip(run(model, x), before, strict=True))
        return

    summary = inject(model, method)
    model.eval()
    equal = all(torch.equal(a, b) for a, b in zip(run(model, x), before, strict=True))
    assert equal != (method in STARTS_ELSEWHERE)
    assert summary.adapters == summary.trainable > 0 and summary.num_sites > 0

    stir(model)
    base = {n: p.clone() for n, p in model.named_parameters() if 'adapter' not in n}
    sum(t.float().square().mean() for t in flatten(model(x))).backward()
    blocks = tuple(f'{site}.' for sites in summary.sites.values() for site in sites)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ('adapter' in name), name
        assert (parameter.grad is not None) == ('adapter' in name) or not name.startswith(blocks), name
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=0.1, weight_decay=0.1).step()
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in base.items())
    assert not torch.equal(run(model, x)[-1], before[-1])
    remove(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(a, b) for a, b in zip(run(model, x), before, strict=True))


@each_family
@pytest.mark.parametrize('method', MERGEABLE)
def test_merge_gives_a_stock_model_with_equal_outputs(method, family):
    model = make(family.build)
    original = copy.deepcopy(model)
    inject(model, method)
    stir(model).eval()
    x = image(family.sizes[0])
    adapted = run(model, x)
    merge(model)
    model.eval()
    assert list(model.state_dict()) == list(original.state_dict())
    assert all(p.requires_grad for p in model.parameters()) and summarize(model).method is None
    close(run(model, x), adapted, rtol=0)
    result = original.load_state_dict(model.state_dict(), strict=False)  # SwinV2 leaves its own tables out
    assert not result.unexpected_keys and not set(result.missing_keys) & dict(original.named_parameters()).keys()
    close(run(original, x), adapted, rtol=0)


@pytest.mark.parametrize('options', [dict(method='vpt', deep=False), dict(method='adapter')])
def test_nothing_of_a_pass_stays_behind(options):
    """A model can be copied after training, by shallow prompts or with recomputed blocks, too."""
    family = next(f for f in FAMILIES if f.name == 'mmseg ViT')
    model = family.build_with_cp()
    inject(model, **options)
    model.train()
    sum(t.square().mean() for t in flatten(model(image((64, 64))))).backward()
    twin = copy.deepcopy(model)
    assert list(twin.state_dict()) == list(model.state_dict())


def test_merge_refuses_what_it_cannot_do():
    model = make_vit()
    with pytest.raises(ValueError, match='VisionTransformer is not adapted: there is nothing to merge'):
        merge(model)
    for method in ('icon', 'vpt', 'frozen', 'full'):
        inject(model, method)
        with pytest.raises(ValueError, match=f"'{method}' cannot be merged .* lora, dora, ssf"):
            merge(model)
        assert summarize(model).method == method
        remove(model)
    add_adapter(model, 'one', 'lora')
    add_adapter(model, 'two', 'bitfit')
    with pytest.raises(ValueError, match='would change the base of the others'):
        merge(model)


@pytest.mark.parametrize(
    ('method', 'family'),
    [(m, f) for m in METHODS for f in FAMILIES if f.name in ('Swin', 'mmseg ViT', 'timm ViT') and defined(m, f)],
    ids=str,
)
def test_gradient_checkpointing(method, family):
    """Recomputed blocks run as they ran: with their weights, prompts and grids."""
    plain, checkpointed = family.build(), family.build_with_cp()
    checkpointed.load_state_dict(plain.state_dict(), strict=False)
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        inject(model, method)
        stir(model).train()
        torch.manual_seed(5)
        sum(t.square().mean() for size in family.sizes for t in flatten(model(image(size)))).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    actual = {n: p.grad for n, p in checkpointed.named_parameters() if p.grad is not None}
    assert expected.keys() == actual.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(actual[key], grad, msg=key, atol=1e-5, rtol=1e-4)


@each_method
def test_files_switching_and_copies(method, tmp_path):
    """An adapter of any method is saved, loaded, switched off and copied like another."""
    model = make_vit()
    inject(model, method)
    stir(model).eval()
    x = image((64, 64))
    adapted = run(model, x)
    twin = copy.deepcopy(model)
    save_adapter(model, tmp_path / 'adapter.safetensors')
    fresh = make_vit()
    base = run(fresh, x)
    load_adapter(fresh, tmp_path / 'adapter.safetensors')
    fresh.eval()
    assert all(torch.equal(a, b) for a, b in zip(run(fresh, x), adapted))
    with disabled(fresh):
        close(run(fresh, x), base, atol=0)
    add_adapter(fresh, 'second', 'bitfit')
    set_adapter(fresh, 'second')
    assert all(torch.equal(a, b) for a, b in zip(run(fresh, x), base))
    set_adapter(fresh, 'default')
    assert all(torch.equal(a, b) for a, b in zip(run(fresh, x), adapted))
    stir(model, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(run(twin, x), adapted))


wrong_in_2_1 = pytest.mark.xfail(
    torch.__version__.startswith('2.1.'), reason='torch.compile of torch 2.1 computes something else with SSF'
)


@pytest.mark.parametrize(
    'method',
    ['lora', 'dora', pytest.param('ssf', marks=wrong_in_2_1), 'adapter', 'mona', 'convpass', 'vpt', 'icon-static'],
)
def test_torch_compile_and_autocast(method):
    model = make_vit()
    inject(model, method)
    stir(model).eval()
    x = image((64, 64))
    expected = run(model, x)
    compiled = torch.compile(model, backend='eager')
    close(run(compiled, x), expected)
    sum(t.mean() for t in flatten(compiled(x))).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith('layers') and 'adapter' in n)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.isfinite(flatten(model(x))[0].float()).all()


# What each method computes, said once more.


def test_lora_is_the_sum_of_weight_and_product():
    model, twin = make_vit(), make_vit()
    inject(model, 'lora', rank=2, alpha=6, targets=['v', 'q', 'fc2'])
    stir(model)
    for index, layer in enumerate(twin.layers):
        own = model.layers[index].adapter
        product = {role: 3 * own.b[role] @ own.a[role] for role in ('q', 'v', 'fc2')}
        layer.attn.qkv.weight.data[:32] += product['q']
        layer.attn.qkv.weight.data[64:] += product['v']
        layer.ffn.layers[1].weight.data += product['fc2']
    close(run(model, image((64, 64))), run(twin, image((64, 64))))


def test_dora_is_magnitude_times_direction():
    model, twin = make_vit(), make_vit()
    inject(model, 'dora', rank=2, alpha=2, targets=['k'])
    stir(model)
    for index, layer in enumerate(twin.layers):
        own = model.layers[index].adapter
        for row in range(32):
            weight = layer.attn.qkv.weight.data[32 + row]
            moved = weight + own.b['k'][row] @ own.a['k']
            magnitude = weight.norm() * (1 + own.magnitude['k'][row])
            layer.attn.qkv.weight.data[32 + row] = magnitude * moved / moved.norm()
    close(run(model, image((64, 64))), run(twin, image((64, 64))))


@pytest.mark.parametrize('method', ['lora', 'dora'])
@each_family
def test_paths_beside_every_linear_map_equal_the_merged_weights(method, family):
    """In double precision; each parameter of a path gets a gradient."""
    model = make(family.build)
    inject(model, method, targets=ROLES)
    stir(model).double()
    model.eval()
    x = image(family.sizes[0]).double()
    outs = flatten(model(x))
    sum(out.square().sum() for out in outs).backward()
    assert [n for n, p in model.named_parameters() if 'adapter' in n and (p.grad is None or not p.grad.any())] == []
    merge(model)
    model.eval()
    close(run(model, x), outs, atol=1e-12, rtol=1e-9)


class _Bypassing(nn.Module):
    """Computes an FFN's layer by a function out of sight, as a fused kernel would."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _fused(x, *self.inner.parameters())


def _fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, weight, bias)


def test_a_path_that_never_runs_is_an_error():
    model = make_vit()
    for layer in model.layers:
        layer.ffn.layers[1] = _Bypassing(layer.ffn.layers[1])
    inject(model, 'lora', targets=['fc2'])
    with pytest.raises(RuntimeError, match=r'did not call layers\.0\.ffn\.layers\.1\.inner, where an adapter acts'):
        run(model, image((64, 64)))


@pytest.mark.parametrize('build', [make_vit, make_swin])
def test_ssf_scales_and_shifts_what_layers_return(build):
    """The paper's form: an operation on features behind every layer."""
    model, twin = build(), build()
    inject(model, 'ssf')
    stir(model)
    scales, shifts = {}, {}
    for attachment in get_injection(model).attachments:
        own = attachment.adapters['adapter']
        for weight, _ in own.layers:
            key = weight.replace('.', '_')
            name = f'{attachment.name}.{weight}'.removesuffix('.weight')
            scales[name], shifts[name] = own.scales[key], own.shifts.get(key, 0)
    for name, module in twin.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm)):
            shape = (1, -1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)
            scale, shift = scales[name].view(shape), shifts[name]
            shift = shift.view(shape) if torch.is_tensor(shift) else shift
            module.register_forward_hook(lambda m, args, out, a=scale, b=shift: out * a + b)
    close(run(model, image((64, 64))), run(twin, image((64, 64))), atol=2e-5)


@pytest.mark.parametrize(
    ('method', 'tuned'),
    [
        ('bitfit', lambda name: name.endswith('bias')),
        ('norm', lambda name: 'norm' in name or 'ln' in name),
        ('partial', lambda name: name.startswith(('layers.1', 'stages.3.blocks.0'))),
    ],
)
@pytest.mark.parametrize('build', [make_vit, make_swin])
def test_tuned_weights_train_as_if_they_were_free(method, tuned, build):
    """Plain SGD on the very parameters of the host gives the same model."""
    model, twin = build(), build()
    inject(model, method)
    names = [name for name, _ in twin.named_parameters() if tuned(name)]
    chosen = [p for n, p in model.named_parameters() if p.requires_grad]
    host = [dict(twin.named_parameters())[name] for name in names]
    assert sum(p.numel() for p in chosen) == sum(p.numel() for p in host)
    for network, parameters in ((model, chosen), (twin, host)):
        optimizer = torch.optim.SGD(parameters, lr=0.5, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            sum(t.square().mean() for t in flatten(network(image((64, 64), seed=step)))).backward()
            optimizer.step()
    close(run(model, image((64, 64))), run(twin, image((64, 64))))
    merge(model)
    for name in names:
        torch.testing.assert_close(dict(model.named_parameters())[name], dict(twin.named_parameters())[name])


def embed(model, x):
    """Tokens as they enter the first block of mmpretrain's ViT."""
    tokens, _ = model.patch_embed(x)
    tokens = torch.cat((model.cls_token.expand(len(x), -1, -1), tokens), dim=1) + model.pos_embed
    return model.pre_norm(tokens)


@pytest.mark.parametrize('deep', [True, False])
def test_prompts_travel_with_the_patches(deep):
    model = make_vit()
    inject(model, 'vpt', num_tokens=3, deep=deep)
    stir(model)
    x = image((64, 64))
    actual = run(model, x)[0]
    prompts = [layer.adapter.tokens if hasattr(layer, 'adapter') else None for layer in model.layers]
    assert (prompts[1] is not None) == deep
    with torch.no_grad(), disabled(model):
        z = embed(model, x)
        z = torch.cat((z[:, :1], prompts[0].expand(2, -1, -1), z[:, 1:]), dim=1)
        for index, layer in enumerate(model.layers):
            if deep:
                z = torch.cat((z[:, :1], prompts[index].expand(2, -1, -1), z[:, 4:]), dim=1)
            z = layer(z)
        expected = model.ln1(torch.cat((z[:, :1], z[:, 4:]), dim=1))
    close([actual], [expected])


@pytest.mark.parametrize('input', ['normed', 'residual', 'output', 'sum'])
@pytest.mark.parametrize('method', ['adapter', 'icon'])
def test_places_of_adapters_in_a_vit(method, input):
    """``x' = x + attn(LN1(x))``, then ``x'' = x' + ffn(LN2(x'))``, each with an adapter that reads one of four."""
    model = make_vit()
    inject(model, method, input=input, sites=['attention', 'ffn'], bottleneck=4)
    stir(model)
    x = image((48, 80))
    actual = run(model, x)[0]
    modules = [(layer.adapter_attention, layer.adapter) for layer in model.layers]
    with torch.no_grad(), disabled(model):
        z, size = model.patch_embed(x)
        grid = TokenGrid(*size, num_prefix_tokens=1)
        z = torch.cat((model.cls_token.expand(len(x), -1, -1), z), dim=1)
        z = model.pre_norm(z + resized(model, size))
        for layer, adapters in zip(model.layers, modules):
            branches = ((layer.ln1, layer.attn), (layer.ln2, lambda t, layer=layer: layer.ffn.layers(t)))
            for adapter, (norm, branch) in zip(adapters, branches):
                out = branch(norm(z))
                reads = dict(normed=norm(z), residual=z, output=out, sum=z + out)[input]
                z = z + out + adapter(reads, grid)
        expected = model.ln1(z)
    close([actual], [expected])


def resized(model, size):
    from mmpretrain.models.utils import resize_pos_embed

    return resize_pos_embed(model.pos_embed, model.patch_resolution, size, mode=model.interpolate_mode)


@pytest.mark.parametrize('input', ['normed', 'residual', 'output', 'sum'])
def test_places_of_adapters_in_a_swin(input):
    from mmpretrain.models.backbones.swin_transformer import SwinBlock

    model = make_swin()
    inject(model, 'icon', input=input, sites=['ffn', 'attention'], bottleneck=4)
    stir(model).eval()
    block = model.stages[0].blocks[0]
    assert isinstance(block, SwinBlock)
    x = torch.randn(2, 12, 16)
    with torch.no_grad():
        actual = block(x, (3, 4))
        adapters = (block.adapter_attention, block.adapter)
        z = x
        branches = ((block.norm1, lambda t: block.attn(t, (3, 4))), (block.norm2, block.ffn.layers))
        with disabled(model):
            for adapter, (norm, branch) in zip(adapters, branches):
                out = branch(norm(z))
                reads = dict(normed=norm(z), residual=z, output=out, sum=z + out)[input]
                z = z + out + adapter(reads, TokenGrid(3, 4))
    close([actual], [z])


def beit_parts(block, x, bias):
    attended = x + block.gamma_1 * block.attn(block.ln1(x), rel_pos_bias=bias)
    return attended, lambda z: z + block.gamma_2 * block.ffn(block.ln2(z)), block.ln1(x)


def swin_v2_parts(block, x, size):
    attended = x + block.norm1(block.attn(x, size))
    return attended, lambda z: z + block.norm2(block.ffn(z)), x


def sam_parts(block, x):
    from mmpretrain.models.backbones.vit_sam import window_partition, window_unpartition

    windows, padded = window_partition(block.ln1(x), block.window_size)
    attended = x + window_unpartition(block.attn(windows), block.window_size, padded, x.shape[1:3])
    return attended, lambda z: block.ffn(block.ln2(z), identity=z), block.ln1(x)


def deit3_parts(block, x):
    return x + block.attn(block.ln1(x)), lambda z: block.ffn(block.ln1(z), identity=z), block.ln1(x)


def timm_swin_parts(block, x):
    attended = x + block._attn(block.norm1(x))
    return attended, lambda z: z + block.mlp(block.norm2(z)), block.norm1(x)


def mit_parts(block, x, size):
    attended = block.attn(block.norm1(x), size, identity=x)
    return attended, lambda z: block.ffn(block.norm2(z), size, identity=z), block.norm1(x)


BLOCK_PARTS = {
    'BEiT': beit_parts,
    'SwinV2': swin_v2_parts,
    'ViT-SAM': sam_parts,
    'DeiT III': deit3_parts,
    'timm Swin': timm_swin_parts,
    'mmseg MiT': mit_parts,
}
BLOCK_INPUTS = {
    'BEiT': lambda block: ((None,), torch.randn(2, 17, 32), TokenGrid(4, 4, 1)),
    'SwinV2': lambda block: (((16, 16),), torch.randn(2, 256, 16), TokenGrid(16, 16)),
    'ViT-SAM': lambda block: ((), torch.randn(2, 4, 4, 32), TokenGrid(4, 4)),
    'DeiT III': lambda block: ((), torch.randn(2, 17, 32), TokenGrid(4, 4, 1)),
    'timm Swin': lambda block: ((), torch.randn(2, 16, 16, 16), TokenGrid(16, 16)),
    'mmseg MiT': lambda block: (((16, 16),), torch.randn(2, 256, 8), TokenGrid(16, 16)),
}


@pytest.mark.parametrize('input', ['normed', 'residual', 'output', 'sum'])
@pytest.mark.parametrize('name', ['BEiT', 'SwinV2', 'ViT-SAM', 'DeiT III', 'timm Swin', 'mmseg MiT'])
def test_attention_in_other_blocks(name, input):
    """Adding to x' by hand, in a copy of the block's code or by its parts, gives what the taps give."""
    family = next(f for f in FAMILIES if f.name == name)
    model = make(family.build)
    summary = inject(model, 'icon', sites=['attention'], input=input, bottleneck=4)
    stir(model)
    block = model.get_submodule(next(iter(summary.sites.values()))[0])
    forward, adapter = block.forward.__self__.host_forward, block.adapter_attention
    run(model, image((64, 64)))  # ViTs remember the grid of 4 x 4
    arguments, x, grid = BLOCK_INPUTS[name](block)
    with torch.no_grad():
        actual = block(x, *arguments)
        with disabled(model):
            attended, ffn, reads = BLOCK_PARTS[name](block, x, *arguments)
            tokens = dict(normed=reads, residual=x, output=attended - x, sum=attended)[input]
            z = attended + adapter(tokens.flatten(1, -2), grid).reshape(x.shape)
            expected = ffn(z)
            close([forward(x, *arguments)], [ffn(attended)])  # the parts are the block's
    close([actual], [expected])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(method='lora', targets='qv'), "targets must be a list of q, k, v, o, fc1, fc2, other, got 'qv'"),
        (dict(method='lora', targets=['x']), 'targets must be a list'),
        (dict(method='lora', rank=0), 'rank must be an integer of at least 1'),
        (dict(method='vpt', num_tokens=0), 'num_tokens must be an integer of at least 1'),
        (dict(method='partial', num_blocks=3), 'num_blocks is 3, but VisionTransformer has 2 blocks'),
        (dict(method='partial', num_blocks=0), 'num_blocks must be an integer of at least 1'),
        (dict(method='lorand', branches=0), 'branches must be an integer of at least 1'),
        (dict(method='icon', sites='ffn'), "sites must be a list of 'attention' and 'ffn', got 'ffn'"),
        (dict(method='icon', sites=['mlp']), 'sites must be a list'),
        (dict(method='icon', input='before'), 'input must be one of normed, residual, output, sum'),
        (dict(method='icon', kernel='fixed'), "kernel must be 'dynamic' or 'static', got 'fixed'"),
        (dict(method='icon', pooling='max'), "pooling must be 'mean' or 'mean_std', got 'max'"),
        (dict(method='icon', generator_layers=3), 'generator_layers must be 1 or 2, got 3'),
        (dict(method=dict(rank=4)), r"config needs a type, e\.g\. dict\(type='icon'\); got \{'rank': 4\}"),
        (dict(method='icon', window_size=0), 'window_size must be None or an integer of at least 1'),
        (dict(method='icon', kernel='static', window_size=4), 'a static kernel is the same for all windows'),
        (dict(method='icon-static', kernel='dynamic'), "kernel must be 'static' in icon-static"),
        (dict(method='icon-static', pooling='mean'), "unknown option 'pooling' of PEFT method 'icon-static'"),
        (dict(method='dora', drop=0.1), r"unknown option 'drop' of PEFT method 'dora' \(did you mean 'dropout'\?\)"),
        (dict(method='lora', dropout=1.0), 'dropout must be at least 0 and below 1'),
        (dict(method='lora', alpha=float('nan')), 'alpha must be a finite number above 0'),
    ],
)
def test_refused_options_leave_no_trace(arguments, message):
    model = make_vit()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        inject(model, **arguments)
    assert list(model.state_dict()) == keys and not model.patch_embed._forward_hooks


def test_low_rank_maps_that_are_not_there():
    """A block without a fused projection is named with what it has."""
    from iconformer_mm.tuning.methods.weights import find_targets
    from iconformer_mm.tuning.sites import find_sites

    model = make_vit()
    model.layers[0].attn.qkv = nn.Identity()
    with pytest.raises(ValueError, match=r'no linear map q in layers\.0 .* its weights: attn\.proj\.weight'):
        find_targets(find_sites(model)[0], ['q'])


def test_weight_methods_need_no_known_blocks():
    from mmpretrain.models.backbones import ResNet

    model = ResNet(18)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith('bias'))
    assert inject(model, 'bitfit').adapters == biases
    remove(model)
    with pytest.raises(ValueError, match='no known Transformer block in ResNet'):
        inject(model, 'lora')
    with pytest.raises(ValueError, match="method 'norm' finds nothing to adapt in Linear"):
        inject(nn.Linear(2, 2), 'norm')
