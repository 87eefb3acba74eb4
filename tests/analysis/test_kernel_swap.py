"""Swapped kernels, against adapters that are computed from the formula with the kernels of another image."""

import pytest
import torch
import torch.nn.functional as F
from families import VIT, stir
from mmengine.registry import MODELS

from iconformer_mm import inject
from iconformer_mm.analysis.kernel_probe import icon_adapters
from iconformer_mm.analysis.kernel_swap import SWAPS, KernelBank, given_kernels


def make(method='icon', **options):
    torch.manual_seed(0)
    backbone = dict(type='mmpretrain.VisionTransformer', arch=VIT, img_size=32, patch_size=8, out_type='avg_featmap')
    model = MODELS.build(backbone)
    inject(model, dict(type=method, bottleneck=8, **options))
    return stir(model).eval()


IMAGES = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def recorded(model):
    bank = KernelBank()
    with bank.recording(model):
        model(IMAGES[:3]), model(IMAGES[3:])
    return bank


@torch.no_grad()
def test_own_kernels_change_nothing():
    model = make()
    expected = model(IMAGES)[0]
    with given_kernels(model, recorded(model).swapped('own')):
        found = torch.cat([model(IMAGES[:2])[0], model(IMAGES[2:])[0]])
    assert torch.equal(found, torch.cat([model(IMAGES[:2])[0], model(IMAGES[2:])[0]]))
    torch.testing.assert_close(found, expected)
    assert torch.equal(model(IMAGES)[0], expected)  # nothing is left in the model


@pytest.mark.parametrize('swap', SWAPS[1:])
@torch.no_grad()
def test_an_adapter_filters_by_the_given_kernels(swap):
    """The first adapter sees the same tokens as before; the formula with other kernels says what it gives."""
    model = make()
    kernels = recorded(model).swapped(swap)
    name, adapter = next(iter(icon_adapters(model).items()))
    seen = []
    handle = adapter.register_forward_hook(lambda m, args, out: seen.append((*args, out)))
    with given_kernels(model, kernels):
        model(IMAGES)
    handle.remove()
    tokens, grid, found = seen[0]
    z = tokens @ adapter.down.weight.T + adapter.down.bias
    prefix = grid.num_prefix_tokens
    maps = z[:, prefix:].unflatten(1, (grid.height, grid.width)).permute(0, 3, 1, 2)
    filtered = [
        F.conv2d(each[None], kernel[:, None], padding=1, groups=len(kernel))[0]
        for each, kernel in zip(maps, kernels[name])
    ]
    z = torch.cat([z[:, :prefix], torch.stack(filtered).permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    expected = adapter.activation(z) @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(found, expected * adapter.scale, rtol=1e-4, atol=1e-5)


def test_every_image_gets_the_kernels_of_one_other_and_all_layers_agree():
    bank = recorded(make())
    sources = []
    for name, own in bank.kernels.items():
        given = bank.swapped('another', seed=3)[name]
        sources.append([next(i for i in range(5) if torch.equal(own[i], each)) for each in given])
    assert sources[0] == sources[1] and sorted(sources[0]) == list(range(5))
    assert all(source != image for image, source in enumerate(sources[0]))


def test_mean_and_random_kernels():
    bank = recorded(make())
    for name, own in bank.kernels.items():
        torch.testing.assert_close(bank.swapped('mean')[name][4], own.mean(0))
        random = torch.cat([bank.swapped('random', seed)[name] for seed in range(400)])
        torch.testing.assert_close(random.mean(0), own.mean(0), rtol=0, atol=float(own.std(0).max()) / 5)
        torch.testing.assert_close(random.std(0), own.std(0), rtol=0.15, atol=1e-4)


@torch.no_grad()
def test_static_kernels_lose_nothing():
    model = make('icon-static')
    expected = model(IMAGES)[0]
    with given_kernels(model, recorded(model).swapped('another')):
        assert torch.equal(model(IMAGES)[0], expected)


@torch.no_grad()
def test_what_cannot_be_swapped():
    model = make()
    bank = recorded(model)
    with pytest.raises(ValueError, match='swap must be one of own, another, mean, random, got'):
        bank.swapped('other')
    with pytest.raises(ValueError, match='more images than kernels'), given_kernels(model, bank.swapped('mean')):
        model(IMAGES), model(IMAGES)
    with pytest.raises(ValueError, match='fewer images than kernels'), given_kernels(model, bank.swapped('mean')):
        model(IMAGES[:4])
    with pytest.raises(ValueError, match='the kernels are of'), given_kernels(model, {'strange': torch.zeros(1)}):
        pass
    lone = KernelBank()
    with lone.recording(model):
        model(IMAGES[:1])
    with pytest.raises(ValueError, match='kernels are swapped between images, and 1 were recorded'):
        lone.swapped('another')
    with pytest.raises(ValueError, match='makes kernels for each window'), KernelBank().recording(make(window_size=2)):
        pass
