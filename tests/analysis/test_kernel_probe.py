"""Kernels and filtered maps, against the adapters' own parameters put into formulas."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from families import stir
from mmengine.registry import MODELS, init_default_scope
from scipy.stats import f_oneway
from trained_adapters import DIGITS, SCENES, digit, trained

from iconformer_mm import inject, save_adapter
from iconformer_mm.analysis.kernel_probe import (
    icon_adapters,
    look_at_adapters,
    share_between_groups,
    share_between_images,
    stack_layers,
)
from iconformer_mm.engine import load_config
from iconformer_mm.inference import AdapterInferencer


def adapted(root, path, method, **options):
    """The digits' base with another method, as an inferencer."""
    cfg = load_config(str(root / DIGITS))
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    inject(model, method, **options)
    save_adapter(stir(model), path)
    return AdapterInferencer(root / DIGITS, path, device='cpu')


def read_tokens(inferencer, image):
    """What each adapter reads, and with which grid, when the image is taken in one piece."""
    seen = {}
    handles = [
        adapter.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args}))
        for name, adapter in icon_adapters(inferencer.model).items()
    ]
    given = inferencer.model.test_cfg if hasattr(inferencer.model, 'test_cfg') else None
    if given is not None and 'mode' in given:
        inferencer.model.test_cfg = type(given)(mode='whole')
    inferencer([image])
    if given is not None:
        inferencer.model.test_cfg = given
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('task', ['digits', 'depth', 'instance'])
def test_kernels_and_maps_by_formula(task, root, tmp_path):
    config = DIGITS if task == 'digits' else SCENES[task]
    trained(root, config, tmp_path / 'a.safetensors')
    inferencer = AdapterInferencer(root / config, tmp_path / 'a.safetensors', device='cpu')
    image = np.random.default_rng(0).integers(0, 255, (28, 28, 3) if task == 'digits' else (96, 128, 3), dtype=np.uint8)
    given = getattr(inferencer.model, 'test_cfg', None)
    looks = look_at_adapters(inferencer, image)
    assert getattr(inferencer.model, 'test_cfg', None) is given
    tokens = read_tokens(inferencer, image)
    assert list(looks) == list(tokens) == list(icon_adapters(inferencer.model)) and len(looks) in (4, 7)
    for name, adapter in icon_adapters(inferencer.model).items():
        x, grid = tokens[name]
        z = x[0, grid.num_prefix_tokens :] @ adapter.down.weight.T + adapter.down.bias
        taps = (adapter.icon.generator.weight @ z.mean(dim=0)).view(16, 9)
        centred = taps - taps.mean(dim=1, keepdim=True)
        normed = centred / (centred.square().mean(dim=1, keepdim=True).sqrt() + 1e-5)
        kernels = (normed * adapter.icon.gamma.view(16, 9) + adapter.icon.beta.view(16, 9)).view(16, 3, 3)
        maps = z.T.reshape(1, 16, grid.height, grid.width)
        filtered = F.conv2d(maps, kernels[:, None], padding=1, groups=16)[0]
        look = looks[name]
        torch.testing.assert_close(torch.from_numpy(look.kernels), kernels.detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.from_numpy(look.before).permute(2, 0, 1), maps[0].detach())
        torch.testing.assert_close(
            torch.from_numpy(look.after).permute(2, 0, 1), filtered.detach(), atol=1e-4, rtol=1e-4
        )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in icon_adapters(inferencer.model)[name].modules())


def test_static_kernels_are_the_same_for_all_images_and_dynamic_ones_are_not(root, tmp_path):
    for method, same in (('icon-static', True), ('icon', False)):
        inferencer = adapted(root, tmp_path / f'{method}.safetensors', method, bottleneck=8)
        first, second = (look_at_adapters(inferencer, digit(seed)) for seed in (0, 1))
        for name, look in first.items():
            assert np.array_equal(look.kernels, second[name].kernels) == same
            share = share_between_images(np.stack([look.kernels, second[name].kernels]))
            assert share == 0 if same else 0 < share < 1


def test_windows_are_averaged(root, tmp_path):
    inferencer = adapted(root, tmp_path / 'a.safetensors', 'icon', bottleneck=8, window_size=4)
    made = {}
    name, adapter = next(iter(icon_adapters(inferencer.model).items()))
    handle = adapter.icon.register_forward_hook(lambda m, args, out: made.update(kernels=out))
    look = look_at_adapters(inferencer, digit())[name]
    handle.remove()
    assert made['kernels'].shape == (4, 8, 3, 3)  # 7 x 7 patches
    np.testing.assert_allclose(look.kernels, sum(made['kernels']).numpy() / 4, rtol=1e-5, atol=1e-6)
    assert look.before.shape == look.after.shape == (7, 7, 8)


def test_a_model_without_icon(root, tmp_path):
    inferencer = adapted(root, tmp_path / 'a.safetensors', 'adaptformer')
    with pytest.raises(ValueError, match="no iCoN adapters .it is adapted by 'adaptformer'.; those of 'icon' and"):
        look_at_adapters(inferencer, digit())
    with pytest.raises(ValueError, match='it is not adapted'):
        icon_adapters(torch.nn.Linear(2, 2))


def test_shares_by_hand():
    """Two images, two channels, one tap: kernels 1 and 3 for one channel, 10 and 12 for the other."""
    kernels = np.array([[1.0, 10.0], [3.0, 12.0]]).reshape(2, 2, 1, 1)
    # Means 2 and 11, in all 6.5: between images 4 x 1, between channels 4 x 4.5^2.
    assert share_between_images(kernels) == pytest.approx(4 / (4 + 81))
    assert share_between_images(np.ones((3, 2, 3, 3))) == 0
    assert share_between_images(kernels[:, :1]) == pytest.approx(1)


def test_layers_weigh_the_same():
    rng = np.random.default_rng(0)
    small, large = rng.normal(size=(5, 2, 3, 3)), 1000 * rng.normal(size=(5, 4, 3, 3))
    stacked = stack_layers(dict(small=small, large=large, zero=np.zeros((5, 1, 3, 3))))
    assert stacked.shape == (5, 18 + 36 + 9)
    for part in (stacked[:, :18], stacked[:, 18:54]):
        assert np.linalg.norm(part, axis=1).mean() == pytest.approx(1)
    assert np.allclose(stacked[:, 18:54] / stacked[0, 18], large.reshape(5, -1) / large[0, 0, 0, 0])


def test_shares_between_groups():
    """Against the F statistic of an analysis of variance; 0 on average for groups that say nothing."""
    rng = np.random.default_rng(0)
    groups = rng.integers(3, size=40)
    values = rng.normal(size=40) + groups
    f = f_oneway(*(values[groups == group] for group in range(3))).statistic
    expected = 2 * (f - 1) / (2 * f + 37)
    assert share_between_groups(values.reshape(40, 1, 1, 1), list(groups)) == pytest.approx(expected)
    noise = rng.normal(size=(400, 8, 3, 3))
    assert abs(share_between_groups(noise, [str(index % 4) for index in range(400)])) < 0.01
    assert share_between_groups(np.repeat(noise[:2], 2, axis=0), [0, 0, 1, 1]) == 1
    assert share_between_groups(np.broadcast_to(noise[:1], (4, 8, 3, 3)), [0, 0, 1, 1]) == 0
    for wrong, message in (([0, 0], '40 images and 2 groups'), ([0] * 40, 'in 1 groups'), (range(40), 'in 40 groups')):
        with pytest.raises(ValueError, match=message):
            share_between_groups(values.reshape(40, 1, 1, 1), wrong)
