import pytest
import torch

from iconformer_mm.ops import dynamic_depthwise_conv2d

BACKENDS = ['auto', 'reference', 'grouped']


def loop(x, kernels):
    """The definition, one number at a time."""
    batch, height, width, channels = x.shape
    size = kernels.shape[-1]
    out = torch.zeros_like(x)
    for b in range(batch):
        for c in range(channels):
            for h in range(height):
                for w in range(width):
                    for i in range(size):
                        for j in range(size):
                            row, column = h + i - size // 2, w + j - size // 2
                            if 0 <= row < height and 0 <= column < width:
                                out[b, h, w, c] += kernels[b, c, i, j] * x[b, row, column, c]
    return out


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('shape', [(1, 4, 4, 2), (2, 3, 5, 3), (3, 1, 1, 1), (2, 2, 7, 1)])
@pytest.mark.parametrize('size', [1, 3, 5])
def test_agrees_with_the_definition(backend, shape, size):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    kernels = torch.randn(shape[0], shape[3], size, size, dtype=torch.float64)
    torch.testing.assert_close(dynamic_depthwise_conv2d(x, kernels, backend), loop(x, kernels))


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('size', [1, 3])
def test_gradients(backend, size):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(2, 2, size, size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: dynamic_depthwise_conv2d(a, b, backend), (x, kernels))


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_empty_batch(backend):
    out = dynamic_depthwise_conv2d(torch.zeros(0, 3, 4, 2), torch.zeros(0, 2, 3, 3), backend)
    assert out.shape == (0, 3, 4, 2)


@pytest.mark.parametrize(
    ('x', 'kernels', 'message'),
    [
        ((2, 3, 2), (2, 2, 3, 3), 'expects x'),
        ((2, 3, 4, 2), (2, 2, 2, 2), 'odd size'),
        ((2, 3, 4, 2), (2, 2, 3, 5), 'square'),
        ((2, 3, 4, 2), (1, 2, 3, 3), 'batch size or channels'),
        ((2, 3, 4, 2), (2, 3, 3, 3), 'batch size or channels'),
    ],
)
def test_refuses_wrong_shapes(x, kernels, message):
    with pytest.raises(ValueError, match=message):
        dynamic_depthwise_conv2d(torch.zeros(x), torch.zeros(kernels))


def test_refuses_an_unknown_backend():
    with pytest.raises(
        ValueError, match="unknown backend 'fast', choose from: auto, reference, grouped, looped, numba, triton"
    ):
        dynamic_depthwise_conv2d(torch.zeros(1, 2, 2, 1), torch.zeros(1, 1, 3, 3), 'fast')
