import math
import re
import shutil

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from scipy.special import erf

from iconformer_mm.adapters import (
    AdaptFormerAdapter,
    ConvpassAdapter,
    DoRAAdapter,
    HoulsbyAdapter,
    ICoN,
    ICoNAdapter,
    LoRAAdapter,
    LoRandAdapter,
    MonaAdapter,
    PromptAdapter,
    SSFAdapter,
    Target,
    TokenGrid,
)
from iconformer_mm.adapters.base import MapConvolution
from iconformer_mm.adapters.icon import filter_windows
from iconformer_mm.tuning.methods import build_method


def randomize(module):
    """Give every parameter a value, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module.double()


def gelu(x):
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def relu(x):
    return np.maximum(x, 0)


def kernels_by_formula(icon, grid_map):
    """METHOD: g = mean of the map, kernels = g W (+ b), FilterNorm over the taps."""
    c, k = icon.channels, icon.kernel_size
    kernels = grid_map.mean(axis=(0, 1)) @ icon.generator.weight.detach().numpy().T
    if icon.kernel_norm is None:
        return (kernels + icon.generator.bias.detach().numpy()).reshape(c, k, k)
    kernels = kernels.reshape(c, k, k)
    mean = kernels.mean(axis=(1, 2), keepdims=True)
    std = kernels.std(axis=(1, 2), keepdims=True)
    return (kernels - mean) / (std + icon.eps) * icon.gamma.detach().numpy() + icon.beta.detach().numpy()


def adapter_by_formula(adapter, tokens, grid, activation, scale):
    """The whole adapter for one sample, in NumPy and SciPy."""
    weights = {name: value.detach().numpy() for name, value in adapter.named_parameters()}
    z = tokens @ weights['down.weight'].T + weights['down.bias']
    prefix = grid.num_prefix_tokens
    if isinstance(adapter, ICoNAdapter):
        maps = z[prefix:].reshape(grid.height, grid.width, -1)
        kernels = kernels_by_formula(adapter.icon, maps)
        filtered = np.stack(
            [correlate2d(maps[..., c], kernels[c], mode='same') for c in range(maps.shape[-1])], axis=-1
        )
        z = np.concatenate([z[:prefix], filtered.reshape(-1, z.shape[-1])])
    return scale * (activation(z) @ weights['up.weight'].T + weights['up.bias'])


@pytest.mark.parametrize('kernel_norm', ['filter', None])
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
@pytest.mark.parametrize('grid', [TokenGrid(3, 4), TokenGrid(5, 2, 1), TokenGrid(2, 2, 5), TokenGrid(1, 1, 2)])
def test_icon_adapter_follows_the_formula(kernel_norm, kernel_size, grid):
    adapter = randomize(ICoNAdapter(6, bottleneck=4, kernel_size=kernel_size, kernel_norm=kernel_norm, scale=0.7))
    tokens = torch.randn(3, grid.num_tokens, 6, dtype=torch.float64)
    out = adapter(tokens, grid).detach().numpy()
    for sample, expected in zip(tokens.numpy(), out):
        np.testing.assert_allclose(adapter_by_formula(adapter, sample, grid, gelu, 0.7), expected, atol=1e-9)


def test_relu_and_learnable_scale():
    adapter = randomize(ICoNAdapter(6, bottleneck=4, activation='relu', learnable_scale=True))
    grid = TokenGrid(3, 4, 1)
    tokens = torch.randn(1, grid.num_tokens, 6, dtype=torch.float64)
    expected = adapter_by_formula(adapter, tokens[0].numpy(), grid, relu, adapter.scale.item())
    np.testing.assert_allclose(adapter(tokens, grid)[0].detach().numpy(), expected, atol=1e-9)
    adapter(tokens, grid).sum().backward()
    assert adapter.scale.grad is not None


def test_adaptformer_follows_the_formula():
    adapter = randomize(AdaptFormerAdapter(6, bottleneck=4)).eval()
    grid = TokenGrid(3, 4, 1)
    tokens = torch.randn(1, grid.num_tokens, 6, dtype=torch.float64)
    expected = adapter_by_formula(adapter, tokens[0].numpy(), grid, relu, 0.1)
    np.testing.assert_allclose(adapter(tokens, grid)[0].detach().numpy(), expected, atol=1e-9)


def test_dropout_acts_in_training_only():
    adapter = randomize(ICoNAdapter(6, bottleneck=8, dropout=0.5))
    grid = TokenGrid(2, 2)
    tokens = torch.randn(2, 4, 6, dtype=torch.float64)
    assert torch.equal(adapter.eval()(tokens, grid), adapter(tokens, grid))
    assert not torch.equal(adapter.train()(tokens, grid), adapter(tokens, grid))


def correlate(maps, weight, bias):
    """A plain convolution of one map (H, W, c) with weights (out, in / groups, K, K)."""
    depth_wise = weight.shape[1] == 1 and weight.shape[0] > 1
    out = []
    for channel in range(len(weight)):
        inputs = [channel] if depth_wise else range(maps.shape[-1])
        sums = sum(correlate2d(maps[..., c], weight[channel, i], mode='same') for i, c in enumerate(inputs))
        out.append(sums + bias[channel])
    return np.stack(out, axis=-1)


def test_houlsby_follows_the_formula():
    adapter = randomize(HoulsbyAdapter(6, bottleneck=4))
    grid = TokenGrid(3, 4, 1)
    tokens = torch.randn(1, grid.num_tokens, 6, dtype=torch.float64)
    expected = adapter_by_formula(adapter, tokens[0].numpy(), grid, gelu, 1)
    np.testing.assert_allclose(adapter(tokens, grid)[0].detach().numpy(), expected, atol=1e-9)


@pytest.mark.parametrize('grid', [TokenGrid(3, 4), TokenGrid(2, 5, 2)])
def test_convpass_follows_the_formula(grid):
    adapter = randomize(ConvpassAdapter(6, bottleneck=4, scale=0.7)).eval()
    tokens = torch.randn(1, grid.num_tokens, 6, dtype=torch.float64)
    w = {name: value.detach().numpy() for name, value in adapter.named_parameters()}
    z = gelu(tokens[0].numpy() @ w['down.weight'].T + w['down.bias'])
    prefix = grid.num_prefix_tokens
    pieces = [correlate(token.reshape(1, 1, -1), w['conv.weight'], w['conv.bias'])[0] for token in z[:prefix]]
    maps = z[prefix:].reshape(grid.height, grid.width, -1)
    pieces.append(correlate(maps, w['conv.weight'], w['conv.bias']).reshape(-1, 4))
    expected = 0.7 * (gelu(np.concatenate(pieces)) @ w['up.weight'].T + w['up.bias'])
    np.testing.assert_allclose(adapter(tokens, grid)[0].detach().numpy(), expected, atol=1e-9)


def test_convpass_begins_as_a_bottleneck_without_convolution():
    torch.manual_seed(0)
    z = torch.randn(1, 12, 4)
    torch.testing.assert_close(ConvpassAdapter(6, bottleneck=4).conv(z.view(1, 3, 4, 4)).view(1, 12, 4), z)


@pytest.mark.parametrize('branches', [1, 2])
def test_lorand_follows_the_formula(branches):
    adapter = randomize(LoRandAdapter(6, kernel_dims=2, branches=branches))
    tokens = torch.randn(1, 12, 6, dtype=torch.float64)
    w = {name: value.detach().numpy() for name, value in adapter.named_parameters()}
    down = sum(w['down_p'][i] @ w['kernels'][i] @ w['down_q'][i] for i in range(branches))
    up = sum(w['up_p'][i] @ w['kernels'][i] @ w['up_q'][i] for i in range(branches))
    expected = gelu(tokens[0].numpy() @ down + w['down_bias']) @ up + w['up_bias']
    np.testing.assert_allclose(adapter(tokens, TokenGrid(3, 4))[0].detach().numpy(), expected, atol=1e-9)


@pytest.mark.parametrize('grid', [TokenGrid(8, 9), TokenGrid(2, 5, 1)])
def test_mona_follows_the_formula(grid):
    adapter = randomize(MonaAdapter(6, bottleneck=4)).eval()
    tokens = torch.randn(1, grid.num_tokens, 6, dtype=torch.float64)
    w = {name: value.detach().numpy() for name, value in adapter.named_parameters()}
    x = tokens[0].numpy()
    normed = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * w['norm.weight']
    x = (normed + w['norm.bias']) * w['gamma'] + x * w['gammax']
    z = x @ w['down.weight'].T + w['down.bias']
    prefix = grid.num_prefix_tokens
    maps = z[prefix:].reshape(grid.height, grid.width, -1)
    maps = maps + sum(correlate(maps, w[f'convs.{i}.weight'], w[f'convs.{i}.bias']) for i in range(3)) / 3
    maps = maps + maps @ w['projector.weight'][..., 0, 0].T + w['projector.bias']
    z = np.concatenate([z[:prefix], maps.reshape(-1, 4)])
    expected = gelu(z) @ w['up.weight'].T + w['up.bias']
    np.testing.assert_allclose(adapter(tokens, grid)[0].detach().numpy(), expected, atol=1e-9)


@pytest.mark.parametrize('kernel_norm', ['filter', None])
def test_static_kernels_are_those_of_all_inputs(kernel_norm):
    icon = randomize(ICoN(4, kernel_norm=kernel_norm, kernel='static'))
    kernels = icon(torch.randn(3, 5, 6, 4, dtype=torch.float64))
    assert torch.equal(kernels[0], kernels[2])
    taps = icon.taps.detach().numpy()
    if kernel_norm:
        taps = (taps - taps.mean(axis=(1, 2), keepdims=True)) / (taps.std(axis=(1, 2), keepdims=True) + icon.eps)
        taps = taps * icon.gamma.detach().numpy() + icon.beta.detach().numpy()
    np.testing.assert_allclose(kernels[0].detach().numpy(), taps)


def test_other_contexts_and_generators():
    """Standard deviations beside means, a hidden layer, a bias."""
    maps = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    icon = randomize(ICoN(4, kernel_norm=None, pooling='mean_std', generator_layers=2))
    context = np.concatenate([maps.numpy().mean(axis=(1, 2)), maps.numpy().std(axis=(1, 2))], axis=1)
    w = {name: value.detach().numpy() for name, value in icon.named_parameters()}
    hidden = gelu(context @ w['hidden.weight'].T + w['hidden.bias'])
    expected = (hidden @ w['generator.weight'].T + w['generator.bias']).reshape(2, 4, 3, 3)
    np.testing.assert_allclose(icon(maps).detach().numpy(), expected)
    assert ICoN(4).generator.bias is None and ICoN(4, generator_bias=True).generator.bias is not None


@pytest.mark.parametrize(('window', 'kernel_size'), [(2, 3), (3, 3), (3, 5), (9, 3), (2, 1)])
def test_windows_have_kernels_of_their_own(window, kernel_size):
    """Against loops over windows and pixels; windows at the edge may be cut, neighbours are seen across borders."""
    icon = randomize(ICoN(4, kernel_size=kernel_size, kernel_norm=None))
    maps = torch.randn(2, 5, 7, 4, dtype=torch.float64)
    kernels = icon(maps, window)
    out = filter_windows(maps, kernels, window)
    columns = math.ceil(7 / window)
    for y in range(5):
        for x in range(7):
            top, left = y // window * window, x // window * window
            tile = maps[1, top : top + window, left : left + window]
            own = icon(tile[None])[0]
            index = len(kernels) // 2 + y // window * columns + x // window
            torch.testing.assert_close(kernels[index], own)
            whole = np.stack([correlate2d(maps[1, ..., c], own[c].detach(), mode='same') for c in range(4)])
            np.testing.assert_allclose(out[1, y, x].detach().numpy(), whole[:, y, x], atol=1e-9)


def test_one_window_over_all_is_the_whole_map():
    torch.manual_seed(0)
    whole, windowed = ICoNAdapter(6, bottleneck=4), ICoNAdapter(6, bottleneck=4, window_size=8)
    randomize(whole)
    randomize(windowed)
    grid = TokenGrid(5, 7, 1)
    tokens = torch.randn(2, grid.num_tokens, 6, dtype=torch.float64)
    torch.testing.assert_close(whole(tokens, grid), windowed(tokens, grid))


@pytest.mark.parametrize('cls', [ICoNAdapter, AdaptFormerAdapter, HoulsbyAdapter, ConvpassAdapter])
def test_starts_at_zero_and_still_learns(cls):
    adapter = cls(8, bottleneck=4)
    out = adapter(torch.randn(2, 6, 8), TokenGrid(2, 3))
    assert torch.equal(out, torch.zeros_like(out))
    out.square().sum().backward()
    (adapter(torch.randn(2, 6, 8), TokenGrid(2, 3)) - 1).square().sum().backward()
    assert adapter.up.weight.grad.abs().sum() > 0


def test_every_parameter_gets_a_gradient():
    adapter = randomize(ICoNAdapter(8, bottleneck=4, learnable_scale=True))
    adapter(torch.randn(2, 6, 8, dtype=torch.float64), TokenGrid(2, 3)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())


@pytest.mark.parametrize('kernel_norm', ['filter', None])
def test_first_kernels_pass_the_signal(kernel_norm):
    icon = ICoN(5, kernel_size=3, kernel_norm=kernel_norm)
    identity = torch.zeros(3, 3)
    identity[1, 1] = 1
    kernels = icon(torch.zeros(1, 4, 4, 5))
    torch.testing.assert_close(kernels, identity.expand(1, 5, 3, 3))


def test_filter_norm_statistics():
    """Before training the part that stirs has zero mean and unit norm."""
    torch.manual_seed(0)
    icon = ICoN(5, kernel_size=3)
    stir = icon(torch.randn(2, 4, 4, 5)) - icon.beta
    torch.testing.assert_close(stir.mean(dim=(2, 3)), torch.zeros(2, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(stir.norm(dim=(2, 3)), torch.ones(2, 5), atol=2e-3, rtol=0)


@pytest.mark.parametrize('maps', [torch.zeros(1, 2, 2, 4), torch.ones(2, 3, 3, 4)])
@pytest.mark.parametrize('kernel_size', [1, 3])
def test_flat_maps_give_finite_gradients(maps, kernel_size):
    icon = ICoN(4, kernel_size=kernel_size)
    maps = maps.clone().requires_grad_()
    icon(maps).square().sum().backward()
    assert torch.isfinite(maps.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in icon.parameters())


def test_kernels_depend_on_their_own_sample_only():
    torch.manual_seed(0)
    icon = ICoN(4)
    maps = torch.randn(3, 5, 6, 4)
    kernels = icon(maps)
    assert not torch.allclose(kernels[0], kernels[1])
    torch.testing.assert_close(icon(maps[1:2]), kernels[1:2])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(bottleneck=0), 'bottleneck must be an integer of at least 1, got 0'),
        (dict(bottleneck=2.5), 'bottleneck must be an integer'),
        (dict(kernel_size=2), 'kernel_size must be odd and at least 1, got 2'),
        (dict(kernel_size=0), 'kernel_size must be odd and at least 1, got 0'),
        (dict(kernel_norm='batch'), "kernel_norm must be 'filter' or None, got 'batch'"),
        (dict(activation='silu'), "activation must be one of gelu, relu, got 'silu'"),
        (dict(dropout=1.0), 'dropout must be at least 0 and below 1'),
        (dict(scale=float('nan')), 'scale must be a finite number'),
    ],
)
def test_refuses_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ICoNAdapter(8, **options)


def test_refuses_tokens_that_do_not_fit_the_grid():
    with pytest.raises(ValueError, match='7 tokens do not fit the grid of 2 x 3 patches and 0 prefix tokens'):
        ICoNAdapter(8)(torch.zeros(1, 7, 8), TokenGrid(2, 3))


@pytest.mark.skipif(not any(map(shutil.which, ('c++', 'g++', 'clang++'))), reason='needs a C++ compiler')
def test_icon_trains_as_compiled_code():
    grid = TokenGrid(6, 5, num_prefix_tokens=1)
    adapter = ICoNAdapter(32, bottleneck=8)
    torch.nn.init.normal_(adapter.up.weight)
    tokens, grad = torch.randn(2, 31, 32, requires_grad=True), torch.randn(2, 31, 32)

    def gradients(function):
        out = function(tokens, grid)
        return [out.detach(), *torch.autograd.grad(out, [tokens, *adapter.parameters()], grad)]

    expected = gradients(adapter)
    torch.testing.assert_close(gradients(torch.compile(adapter, fullgraph=True)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('window', [None, 3])
def test_standard_deviations_in_half_precision(dtype, window):
    """Of flat maps, of maps whose squares half precision does not hold, and of small changes on a large mean."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 6, 6, 4, generator=generator)
    for maps in (torch.zeros(2, 6, 6, 4), torch.ones(2, 6, 6, 4), 500 * noise, 100 + noise):
        maps = maps.to(dtype).requires_grad_()
        pooled = ICoN(4, pooling='mean_std').pool(maps, window)
        assert pooled.dtype == dtype
        exact = maps.detach().double()
        if window:
            exact = exact.unflatten(2, (2, 3)).unflatten(1, (2, 3)).transpose(2, 3).reshape(8, 3, 3, 4)
        std = exact.var(dim=(1, 2), unbiased=False).sqrt()
        expected = torch.cat((exact.mean(dim=(1, 2)), std), dim=1)
        tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-3
        torch.testing.assert_close(pooled.double(), expected, rtol=tolerance, atol=tolerance)
        pooled[:, 4:].sum().backward()
        assert torch.isfinite(maps.grad).all()
        # Standard deviations are differentiated to deviations over n times themselves; flat maps have none.
        centred = exact - exact.mean(dim=(1, 2), keepdim=True)
        truth = centred / (exact[0, ..., 0].numel() * std.clamp_min(1e-6)[:, None, None])
        if window:
            truth = truth.reshape(2, 2, 2, 3, 3, 4).transpose(2, 3).reshape(2, 6, 6, 4)
        torch.testing.assert_close(maps.grad.double(), truth, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize('options', [dict(), dict(window_size=2), dict(pooling='mean_std'), dict(kernel='static')])
def test_a_batch_of_no_images(options):
    adapter = randomize(ICoNAdapter(6, bottleneck=4, **options))
    tokens = torch.zeros(0, 13, 6, dtype=torch.float64, requires_grad=True)
    out = adapter(tokens, TokenGrid(3, 4, 1))
    assert out.shape == (0, 13, 6)
    out.sum().backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in adapter.parameters())


def test_a_map_without_patches():
    adapter = randomize(ICoNAdapter(6, bottleneck=4))
    tokens = torch.randn(2, 1, 6, dtype=torch.float64)
    out = adapter(tokens, TokenGrid(0, 4, 1))
    expected = adapter(torch.cat((tokens, tokens), dim=1), TokenGrid(1, 1, 1))[:, :1]
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())


ADAPTERS = [
    (ICoNAdapter, dict(bottleneck=4)),
    (ICoNAdapter, dict(bottleneck=4, pooling='mean_std', generator_layers=2)),
    (ICoNAdapter, dict(bottleneck=4, window_size=2)),
    (ICoNAdapter, dict(bottleneck=4, kernel='static')),
    (AdaptFormerAdapter, dict(bottleneck=4)),
    (HoulsbyAdapter, dict(bottleneck=4)),
    (ConvpassAdapter, dict(bottleneck=4)),
    (MonaAdapter, dict(bottleneck=4)),
    (LoRandAdapter, dict(kernel_dims=2)),
]


@pytest.mark.parametrize(('cls', 'options'), ADAPTERS)
def test_transforms_of_torch_func(cls, options):
    """Tangents against numerical derivatives, gradients a sample against the gradient of all."""
    adapter = randomize(cls(6, **options)).eval()
    grid, generator = TokenGrid(3, 4, 1), torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 13, 6, generator=generator, dtype=torch.float64)
    parameters = dict(adapter.named_parameters())

    def call(parameters, tokens):
        return torch.func.functional_call(adapter, parameters, (tokens, grid))

    def loss(parameters, tokens):
        return call(parameters, tokens).sin().sum()

    tangent, step = tokens.cos(), 1e-6
    out = torch.func.jvp(lambda t: call(parameters, t), (tokens,), (tangent,))[1]
    difference = (adapter(tokens + step * tangent, grid) - adapter(tokens - step * tangent, grid)) / (2 * step)
    torch.testing.assert_close(out, difference.detach(), rtol=1e-4, atol=1e-5)
    samples = torch.func.vmap(torch.func.grad(lambda p, t: loss(p, t[None])), in_dims=(None, 0))(parameters, tokens)
    for name, parameter in parameters.items():
        expected = torch.autograd.grad(loss(parameters, tokens), parameter)[0]
        torch.testing.assert_close(samples[name].sum(0), expected)
    hessian = torch.autograd.functional.hessian(lambda t: loss(parameters, t), tokens[:1])
    torch.testing.assert_close(torch.func.hessian(loss, 1)(parameters, tokens[:1]), hessian)


TARGETS = [Target('weight', 'q', (0, 4), 4)]


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (lambda: ConvpassAdapter(8, kernel_size=2), 'kernel_size must be odd and at least 1, got 2'),
        (lambda: ConvpassAdapter(8, kernel_size=4), 'kernel_size must be odd and at least 1, got 4'),
        (lambda: ConvpassAdapter(8, kernel_size=3.0), 'kernel_size must be odd and at least 1, got 3.0'),
        (lambda: MapConvolution(8, 2), 'kernel_size must be odd and at least 1, got 2'),
        (lambda: ICoNAdapter(8, kernel_size=True), 'kernel_size must be odd and at least 1, got True'),
        (lambda: ICoN(4, eps=float('nan')), 'eps must be a finite number above 0, got nan'),
        (lambda: ICoN(4, eps=0), 'eps must be a finite number above 0, got 0'),
        (lambda: ICoN(4, generator_layers=True), 'generator_layers must be 1 or 2, got True'),
        (lambda: ICoN(4, generator_bias='no'), "generator_bias must be True or False, got 'no'"),
        (lambda: ICoN(0), 'channels must be an integer of at least 1, got 0'),
        (lambda: ICoNAdapter(8, window_size=0), 'window_size must be None or an integer of at least 1, got 0'),
        (lambda: ICoNAdapter(8, learnable_scale=1), 'learnable_scale must be True or False, got 1'),
        (lambda: AdaptFormerAdapter(8, scale=float('inf')), 'scale must be a finite number, got inf'),
        (lambda: AdaptFormerAdapter(8, scale='0.1'), "scale must be a finite number, got '0.1'"),
        (lambda: HoulsbyAdapter(8, dropout=float('nan')), 'dropout must be at least 0 and below 1, got nan'),
        (lambda: MonaAdapter(8, dropout='0'), "dropout must be at least 0 and below 1, got '0'"),
        (lambda: MonaAdapter(-8), 'embed_dims must be an integer of at least 1, got -8'),
        (lambda: LoRandAdapter(8, branches=0), 'branches must be an integer of at least 1, got 0'),
        (lambda: LoRAAdapter(TARGETS, 4, float('nan')), 'alpha must be a finite number above 0, got nan'),
        (lambda: LoRAAdapter(TARGETS, 4, float('inf')), 'alpha must be a finite number above 0, got inf'),
        (lambda: LoRAAdapter(TARGETS, 4, 0), 'alpha must be a finite number above 0, got 0'),
        (lambda: DoRAAdapter(TARGETS, 4, float('nan')), 'alpha must be a finite number above 0, got nan'),
        (lambda: LoRAAdapter(TARGETS, 4, 8, dropout=1), 'dropout must be at least 0 and below 1, got 1'),
        (lambda: DoRAAdapter(TARGETS, 4, 8, dropout=float('nan')), 'dropout must be at least 0 and below 1, got nan'),
        (lambda: LoRAAdapter(TARGETS, 4, 8, rank_stabilized='no'), "rank_stabilized must be True or False, got 'no'"),
        (lambda: SSFAdapter([('weight', None, 4)], float('nan')), 'std must be a finite number of at least 0, got nan'),
        (lambda: SSFAdapter([('weight', None, 4)], -0.1), 'std must be a finite number of at least 0, got -0.1'),
        (lambda: PromptAdapter(8, 12, 2, dropout=float('nan')), 'dropout must be at least 0 and below 1, got nan'),
        (lambda: PromptAdapter(8, 12, 2, dropout=1), 'dropout must be at least 0 and below 1, got 1'),
        (lambda: PromptAdapter(8, 0, 2), 'patch_dims must be an integer of at least 1, got 0'),
        (lambda: build_method('lora', alpha=float('nan')), 'alpha must be a finite number above 0, got nan'),
        (lambda: build_method('dora', rank=0), 'rank must be an integer of at least 1, got 0'),
        (lambda: build_method('dora', dropout='0'), "dropout must be at least 0 and below 1, got '0'"),
        (lambda: build_method('lora', rank_stabilized=1), 'rank_stabilized must be True or False, got 1'),
        (lambda: build_method('ssf', std=float('inf')), 'std must be a finite number of at least 0, got inf'),
        (lambda: build_method('vpt', dropout=float('nan')), 'dropout must be at least 0 and below 1, got nan'),
        (lambda: build_method('vpt', num_tokens=0), 'num_tokens must be an integer of at least 1, got 0'),
        (lambda: build_method('vpt', deep='no'), "deep must be True or False, got 'no'"),
    ],
)
def test_refuses_numbers_out_of_range(make, message):
    """Before anything is trained: a NaN would train nothing but NaN."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_refuses_a_grid_with_a_negative_prefix():
    with pytest.raises(ValueError, match='num_prefix_tokens must be at least 0, got -1'):
        ICoNAdapter(8)(torch.zeros(1, 5, 8), TokenGrid(2, 3, -1))
