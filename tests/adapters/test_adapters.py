import math
import shutil

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from scipy.special import erf

from iconformer_mm.adapters import (
    AdaptFormerAdapter,
    ConvpassAdapter,
    HoulsbyAdapter,
    ICoN,
    ICoNAdapter,
    LoRandAdapter,
    MonaAdapter,
    TokenGrid,
)
from iconformer_mm.adapters.icon import filter_windows


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
