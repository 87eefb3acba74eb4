"""The prototypes of iCoN's generator compute what they are named after."""

import pytest
import torch
import torch.nn.functional as F

from iconformer_mm.adapters import ICoNAdapter
from iconformer_mm.adapters.base import TokenGrid

GRID = TokenGrid(4, 5, num_prefix_tokens=1)


@pytest.fixture
def adapter_class(import_methods):
    return import_methods('icon_variants').VariantAdapter


def make(adapter_class, **options):
    torch.manual_seed(0)
    adapter = adapter_class(12, bottleneck=6, **options)
    torch.nn.init.normal_(adapter.up.weight)
    return adapter


def test_without_options_it_is_icon(adapter_class):
    adapter = make(adapter_class)
    icon = ICoNAdapter(12, bottleneck=6)
    own = {name.replace('layers.0', 'generator'): value for name, value in adapter.state_dict().items()}
    icon.load_state_dict(own)
    tokens = torch.randn(2, 21, 12)
    torch.testing.assert_close(adapter(tokens, GRID), icon(tokens, GRID))


@pytest.mark.parametrize(
    'options',
    [
        dict(context='normed'),
        dict(context='class'),
        dict(context='attention'),
        dict(rank=2),
        dict(residual=True),
        dict(class_sees=True),
    ],
    ids=str,
)
def test_as_a_loop_over_images_and_channels(adapter_class, options):
    """Each kernel is made for its image and channel alone, and applied by a convolution of one channel."""
    adapter = make(adapter_class, **options)
    if options.get('context') == 'attention':
        torch.nn.init.normal_(adapter.icon.query)
    tokens = torch.randn(2, 21, 12)
    z = adapter.down(tokens)
    out = z.clone()
    weight = torch.eye(6)
    for layer in adapter.icon.layers:
        weight = layer.weight @ weight
    for image in range(2):
        patches = z[image, 1:]
        context = patches.mean(0)
        if options.get('context') == 'class':
            context = z[image, 0]
        elif options.get('context') == 'attention':
            context = torch.softmax(patches @ adapter.icon.query / 6**0.5, 0) @ patches
        elif options.get('context') == 'normed':
            context = (context - context.mean()) / (context.var(unbiased=False) + 1e-5).sqrt()
        for channel in range(6):
            taps = (weight @ context).view(6, 9)[channel]
            taps = (taps - taps.mean()) / (taps.std(unbiased=False) + 1e-5)
            kernel = (taps * adapter.icon.gamma[channel].flatten() + adapter.icon.beta[channel].flatten()).view(3, 3)
            plane = patches[:, channel].view(1, 1, 4, 5)
            filtered = F.conv2d(plane, kernel[None, None], padding=1).flatten()
            out[image, 1:, channel] = filtered + (patches[:, channel] if options.get('residual') else 0)
            if options.get('class_sees'):
                out[image, 0, channel] += filtered.mean()
    torch.testing.assert_close(adapter(tokens, GRID), adapter.up(F.gelu(out)), rtol=1e-4, atol=1e-5)


def test_an_unknown_context_is_said(adapter_class):
    with pytest.raises(ValueError, match='context must be one of mean, normed, class, attention'):
        adapter_class(12, context='maximum')
