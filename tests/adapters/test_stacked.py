"""Adapters that run as one are those that run one after the other."""

import pytest
import torch
from torch import nn

from iconformer_mm.adapters import (
    AdaptFormerAdapter,
    ConvpassAdapter,
    DoRAAdapter,
    HoulsbyAdapter,
    ICoNAdapter,
    LoRAAdapter,
    LoRandAdapter,
    MonaAdapter,
    Target,
    TokenGrid,
)
from iconformer_mm.adapters.stacked import STACKED, Looped, kind_of, stack

GRID = TokenGrid(3, 5, num_prefix_tokens=1)
COUNTS = [(1, 1, 1), (2, 2, 2), (1, 1, 3)]


def stirred(adapters):
    torch.manual_seed(1)
    for adapter in adapters:
        adapter.double().eval()
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
    return adapters


BRANCH = [
    (AdaptFormerAdapter, dict(bottleneck=4)),
    (AdaptFormerAdapter, dict(bottleneck=4, learnable_scale=True, activation='gelu')),
    (HoulsbyAdapter, dict(bottleneck=4)),
    (ConvpassAdapter, dict()),
    (LoRandAdapter, dict(branches=4)),
    (MonaAdapter, dict(bottleneck=4)),
    (ICoNAdapter, dict(bottleneck=4)),
    (ICoNAdapter, dict(bottleneck=4, pooling='mean_std', generator_layers=2, generator_bias=True, scale=0.3)),
    (ICoNAdapter, dict(bottleneck=4, window_size=2, kernel_norm=None)),
    (ICoNAdapter, dict(bottleneck=4, kernel='static')),
    (ICoNAdapter, dict(bottleneck=4, kernel='static', kernel_norm=None)),
]


@pytest.mark.parametrize('each', [1, 4], ids=['samples', 'windows'])
@pytest.mark.parametrize('counts', COUNTS, ids=str)
@pytest.mark.parametrize(('cls', 'options'), BRANCH, ids=lambda value: getattr(value, '__name__', str(value)))
@torch.no_grad()
def test_branch_adapters(cls, options, counts, each):
    adapters = stirred([cls(8, **options) for _ in counts])
    tokens = torch.rand(each * sum(counts), GRID.num_tokens, 8, dtype=torch.float64)
    expected = [
        adapter(part, GRID) for adapter, part in zip(adapters, tokens.split([each * count for count in counts]))
    ]
    stacked = stack(adapters, counts)
    assert not isinstance(stacked, Looped) and len({kind_of(adapter) for adapter in adapters}) == 1
    torch.testing.assert_close(stacked(tokens, GRID), torch.cat(expected), rtol=0, atol=1e-11)


QKV = [Target('qkv.weight', 'q', (0, 6), 8), Target('qkv.weight', 'v', (12, 18), 8)]
HEADS = [Target('qkv.weight', 'q', (0, 2), 8, groups=3), Target('qkv.weight', 'v', (4, 6), 8, groups=3)]


@pytest.mark.parametrize('counts', COUNTS, ids=str)
@pytest.mark.parametrize('targets', [QKV, HEADS], ids=['rows', 'head by head'])
@pytest.mark.parametrize('is_map', [False, True], ids=['linear', 'convolution'])
@pytest.mark.parametrize('cls', [LoRAAdapter, DoRAAdapter])
@torch.no_grad()
def test_low_rank_paths(cls, is_map, targets, counts):
    adapters = stirred([cls(targets, 3, alpha) for alpha in range(2, 2 + len(counts))])
    layer = (nn.Conv2d(8, 18, 1) if is_map else nn.Linear(8, 18)).double()
    x = torch.rand(2 * sum(counts), *((8, 3, 2) if is_map else (5, 8)), dtype=torch.float64)
    out = layer(x)
    sizes = [2 * count for count in counts]
    expected = [
        adapter.add_path('qkv.weight', layer, *parts)
        for adapter, *parts in zip(adapters, x.split(sizes), out.split(sizes))
    ]
    found = stack(adapters, counts).add_path('qkv.weight', layer, x, out)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-11)


class Doubled(HoulsbyAdapter):
    def forward(self, tokens, grid=None):
        return 2 * super().forward(tokens, grid)


@torch.no_grad()
def test_a_class_of_ones_own_is_not_taken_for_that_it_inherits_from():
    assert Doubled not in STACKED
    adapters = stirred([Doubled(8, bottleneck=4) for _ in range(2)])
    tokens = torch.rand(3, GRID.num_tokens, 8, dtype=torch.float64)
    expected = torch.cat((adapters[0](tokens[:2]), adapters[1](tokens[2:])))
    torch.testing.assert_close(stack(adapters, (2, 1))(tokens), expected, rtol=0, atol=1e-12)
    assert kind_of(adapters[0]) != kind_of(HoulsbyAdapter(8, bottleneck=4).double())


def test_settings_that_change_the_result_keep_adapters_apart():
    base = kind_of(ICoNAdapter(8, bottleneck=4))
    for options in (dict(pooling='mean_std'), dict(window_size=2), dict(activation='relu'), dict(kernel_norm=None)):
        assert kind_of(ICoNAdapter(8, bottleneck=4, **options)) != base
    assert kind_of(ICoNAdapter(8, bottleneck=4, scale=0.1, dropout=0.5)) == base
