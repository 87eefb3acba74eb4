import subprocess
import sys
from functools import partial

import pytest
import torch
from operator_checks import assert_near, needs_triton, run_compiled, run_interpreted

from iconformer_mm.ops import backends, dynamic_depthwise_conv2d, dynamic_depthwise_conv_tokens

BACKENDS = ['auto', 'reference', 'grouped', 'looped', 'numba']
each_backend = pytest.mark.parametrize('backend', BACKENDS)


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


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(function, *tensors, grad):
    """What a function returns, and the gradients of its arguments."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def exact_gradients(tokens, kernels, grad, height, width):
    """The filtered tokens and the gradients of tokens and kernels, by the reference in double precision."""
    exact = [t.detach().double().requires_grad_() for t in (tokens, kernels)]
    reference = partial(dynamic_depthwise_conv_tokens, height=height, width=width, backend='reference')
    return gradients(reference, *exact, grad=grad.double())


@each_backend
@pytest.mark.parametrize('shape', [(1, 4, 4, 2), (2, 3, 5, 3), (3, 1, 1, 1), (2, 2, 7, 1)])
@pytest.mark.parametrize('size', [1, 3, 5, 7])
def test_agrees_with_the_definition(backend, shape, size):
    x = random(*shape).detach()
    kernels = random(shape[0], shape[3], size, size, seed=1).detach()
    torch.testing.assert_close(dynamic_depthwise_conv2d(x, kernels, backend), loop(x, kernels))


@each_backend
@pytest.mark.parametrize('size', [1, 3, 5, 7])
def test_first_and_second_derivatives(backend, size):
    x, kernels = random(2, 2 + 3 * 6, 2), random(2, 2, size, size, seed=1)

    def function(a, b):
        return dynamic_depthwise_conv_tokens(a, b, 3, 6, backend)

    assert torch.autograd.gradcheck(function, (x, kernels))
    assert torch.autograd.gradgradcheck(function, (x, kernels))


@each_backend
def test_prefix_tokens_pass(backend):
    tokens, kernels, grad = random(2, 3 + 4 * 5, 2), random(2, 2, 3, 3, seed=1), random(2, 23, 2, seed=2).detach()
    maps = tokens[:, 3:].unflatten(1, (4, 5)).detach().requires_grad_()
    out, grad_tokens, grad_kernels = gradients(
        lambda t, k: dynamic_depthwise_conv_tokens(t, k, 4, 5, backend), tokens, kernels, grad=grad
    )
    expected = gradients(loop, maps, kernels, grad=grad[:, 3:].unflatten(1, (4, 5)))
    assert torch.equal(out[:, :3], tokens[:, :3]) and torch.equal(grad_tokens[:, :3], grad[:, :3])
    torch.testing.assert_close([out[:, 3:], grad_tokens[:, 3:]], [t.flatten(1, 2) for t in expected[:2]])
    torch.testing.assert_close(grad_kernels, expected[2])


@each_backend
@pytest.mark.parametrize('shape', [(8, 32, 32, 64), (3, 14, 13, 20), (1, 50, 84, 16)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_precision_at_real_sizes(backend, shape, dtype):
    """Against the reference in float64, of the same rounded values."""
    tensors = [random(*shape, dtype=dtype), random(shape[0], shape[3], 3, 3, dtype=dtype, seed=1)]
    grad = random(*shape, dtype=dtype, seed=2).detach()
    actual = gradients(lambda x, k: dynamic_depthwise_conv2d(x, k, backend), *tensors, grad=grad)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = gradients(lambda x, k: dynamic_depthwise_conv2d(x, k, 'reference'), *exact, grad=grad.double())
    # Sums of half precision in plain PyTorch round at every step.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert all(value.dtype == dtype for value in actual)
    assert_near(actual, expected, tolerance)


@each_backend
def test_infinities_and_nan_are_not_lost(backend):
    """Loss scaling looks for them."""
    for bad in (float('inf'), float('nan')):
        x, kernels = torch.ones(1, 4, 4, 1), torch.ones(1, 1, 3, 3)
        x[0, 1, 1] = bad
        out = dynamic_depthwise_conv2d(x, kernels, backend)
        assert not torch.isfinite(out[0, :3, :3]).any()
        assert torch.equal(out[0, 3], torch.tensor([[4.0], [6.0], [6.0], [4.0]]))


def test_number_of_threads_changes_the_rounding_only():
    tensors, grad = [random(2, 40, 40, 64, dtype=torch.float32), random(2, 64, 3, 3, dtype=torch.float32)], 1.0
    grad = random(2, 40, 40, 64, dtype=torch.float32, seed=2).detach()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 3):
            torch.set_num_threads(count)
            results.append(gradients(lambda x, k: dynamic_depthwise_conv2d(x, k, 'numba'), *tensors, grad=grad))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0], results[1])
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2]))


def test_works_in_a_forked_process():
    """Its threads do not come along. All else is NumPy's here, since OpenMP cannot be used before and after a fork."""
    program = """if True:
        import os, numpy, torch
        from iconformer_mm.ops import dynamic_depthwise_conv2d as conv
        torch.set_num_threads(2)
        x, k = (torch.from_numpy(numpy.ones(s, numpy.float32)) for s in ((2, 64, 64, 16), (2, 16, 3, 3)))
        expected = conv(x, k, 'numba').numpy()
        child = os.fork()
        if child == 0:
            os._exit(0 if (conv(x, k, 'numba').numpy() == expected).all() else 1)
        assert os.waitpid(child, 0)[1] == 0
    """
    subprocess.run([sys.executable, '-c', program], check=True, timeout=120)


@pytest.mark.parametrize('backend', ['auto', 'reference'])
def test_empty_batch(backend):
    out = dynamic_depthwise_conv2d(torch.zeros(0, 3, 4, 2), torch.zeros(0, 2, 3, 3), backend)
    assert out.shape == (0, 3, 4, 2)


@pytest.mark.skipif(not hasattr(torch.library, 'opcheck'), reason='torch.library.opcheck came with torch 2.4')
def test_is_a_proper_operator():
    """Schema, fake kernels and derivative, as torch checks them."""
    x, kernels = random(2, 1 + 3 * 4, 2), random(2, 2, 3, 3, seed=1)
    operators = torch.ops.iconformer_mm
    torch.library.opcheck(operators.dynamic_conv.default, (x, kernels, 3, 4, 'auto'))
    torch.library.opcheck(operators.dynamic_conv_kernel_gradient.default, (x, x, 3, 3, 4, 'auto'))
    # Autograd does not see this one.
    tests = ('test_schema', 'test_faketensor')
    detached = x.detach(), x.detach(), kernels.detach()
    torch.library.opcheck(operators.dynamic_conv_gradients.default, (*detached, 3, 4, 'auto'), test_utils=tests)


@each_backend
def test_results_of_operators_lie_as_compilers_are_told(backend):
    tokens, kernels = random(2, 1 + 5 * 4, 3).detach(), random(2, 3, 3, 3, seed=1).detach()
    settings = (5, 4, backend)
    operators = torch.ops.iconformer_mm
    results = [
        operators.dynamic_conv(tokens, kernels, *settings),
        operators.dynamic_conv_kernel_gradient(tokens, tokens, 3, *settings),
        *operators.dynamic_conv_gradients(tokens, tokens, kernels, *settings),
    ]
    assert all(tensor.is_contiguous() for tensor in results)


def test_compiles_to_one_graph():
    tensors, grad = [random(2, 3, 4, 2), random(2, 2, 3, 3, seed=1)], torch.ones(2, 3, 4, 2, dtype=torch.float64)

    def function(x, kernels):
        return dynamic_depthwise_conv2d(x.sin(), kernels * 2).cos()

    # Forward and backward are traced as graphs of operators; no code is generated for them.
    compiled = torch.compile(function, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(gradients(compiled, *tensors, grad=grad), gradients(function, *tensors, grad=grad))


def test_autocast_keeps_one_dtype():
    """Maps come in half precision out of a projection, learned kernels in single."""
    x, kernels = random(1, 3, 4, 2, dtype=torch.float32), random(1, 2, 3, 3, dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        out = dynamic_depthwise_conv2d(x.to(torch.bfloat16), kernels)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and kernels.grad.dtype == torch.float32


@needs_triton
def test_triton_in_its_interpreter():
    """The kernels run without a GPU, in a process that interprets them from the start."""
    run_interpreted(__file__)


@pytest.mark.parametrize(
    ('shape', 'size', 'dtype'),
    [((2, 1, 5, 7, 3), size, torch.float32) for size in (1, 3, 5, 7)]
    + [((2, 1, 5, 7, 3), 3, dtype) for dtype in (torch.float64, torch.float16)]
    + [((1, 0, 16, 17, 70), 3, torch.float32)],  # several programs along tokens and channels
)
def interpreted_triton(shape, size, dtype):
    batch, prefix, height, width, channels = shape
    tensors = [
        random(batch, prefix + height * width, channels, dtype=dtype),
        random(batch, channels, size, size, dtype=dtype, seed=1),
    ]
    grad = random(*tensors[0].shape, dtype=dtype, seed=2).detach()
    actual = gradients(lambda x, k: dynamic_depthwise_conv_tokens(x, k, height, width, 'triton'), *tensors, grad=grad)
    expected = exact_gradients(*tensors, grad, height, width)
    # Sums are in single precision at least, so that half precision is rounded once.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3}[dtype]
    assert all(value.dtype == dtype for value in actual)
    assert_near(actual, expected, tolerance)
    # Kernels in other places of memory: channels innermost, or the same for all samples.
    for kernels in (
        tensors[1].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        tensors[1][:1].expand(batch, -1, -1, -1),
    ):
        out = [
            dynamic_depthwise_conv_tokens(tensors[0], k, height, width, 'triton')
            for k in (kernels, kernels.contiguous())
        ]
        assert torch.equal(*out)


@needs_triton
@pytest.mark.parametrize(
    ('shape', 'size', 'dtype'),
    [((2, 1, 9, 19, 64), 3, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    + [((1, 0, 5, 3, 72), 3, torch.bfloat16)]  # two programs along channels
    + [((1, 2, 5, 9, 40), 5, torch.bfloat16), ((1, 0, 9, 4, 5), 1, torch.float32)],
)
def test_triton_as_compiled_for_a_gpu(monkeypatch, shape, size, dtype):
    """What the interpreter does not tell: Triton has lost a variable of a loop, silently."""
    batch, prefix, height, width, channels = shape
    tokens = random(batch, prefix + height * width, channels, dtype=dtype).detach()
    grad = random(*tokens.shape, dtype=dtype, seed=2).detach()
    # Channels innermost, as they come out of FilterNorm.
    kernels = random(batch, size, size, channels, dtype=dtype, seed=1).detach().permute(0, 3, 1, 2)
    expected = exact_gradients(tokens, kernels, grad, height, width)
    backend = backends.find('triton')
    run_compiled(monkeypatch, backend, '_convolve', '_convolve_3x3')
    actual = [backend.correlate(tokens, kernels, height, width)]
    actual += backend.gradients(grad, tokens, kernels, height, width)
    actual += [backend.kernel_gradient(grad, tokens, size, height, width)]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert_near(actual, [*expected, expected[-1]], tolerance)


@needs_triton
def test_triton_refuses_the_cpu():
    with pytest.raises(RuntimeError, match="'triton' needs tensors on a CUDA device, got them on cpu"):
        dynamic_depthwise_conv2d(torch.ones(1, 2, 2, 1), torch.ones(1, 1, 3, 3), 'triton')


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('size', [1, 3, 5, 7])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('backend', ['auto', 'grouped', 'triton'])
def test_on_a_gpu(backend, dtype, size):
    tensors = [random(3, 1 + 20 * 27, 64, dtype=dtype), random(3, 64, size, size, dtype=dtype, seed=1)]
    grad = random(*tensors[0].shape, dtype=dtype, seed=2).detach()
    cuda = [t.detach().cuda().requires_grad_() for t in tensors]
    actual = gradients(lambda x, k: dynamic_depthwise_conv_tokens(x, k, 20, 27, backend), *cuda, grad=grad.cuda())
    expected = exact_gradients(*tensors, grad, 20, 27)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}[dtype]
    assert_near(actual, expected, tolerance)


def test_without_numba_another_backend_serves(monkeypatch):
    found = backends.find
    monkeypatch.setattr(backends, 'find', lambda name: None if name == 'numba' else found(name))
    for shape in ((2, 3, 4, 2), (1, 32, 32, 64)):
        x, kernels = random(*shape), random(shape[0], shape[3], 3, 3, seed=1)
        expected = dynamic_depthwise_conv2d(x, kernels, 'reference')
        torch.testing.assert_close(dynamic_depthwise_conv2d(x, kernels), expected)
    with pytest.raises(RuntimeError, match="backend 'numba' needs the package numba"):
        dynamic_depthwise_conv2d(x, kernels, 'numba')


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


def test_refuses_too_few_tokens():
    with pytest.raises(ValueError, match='11 tokens are fewer than those of a map of 3 x 4'):
        dynamic_depthwise_conv_tokens(torch.zeros(1, 11, 1), torch.zeros(1, 1, 3, 3), 3, 4)


def test_refuses_an_unknown_backend():
    with pytest.raises(
        ValueError, match="unknown backend 'fast', choose from: auto, reference, grouped, looped, numba, triton"
    ):
        dynamic_depthwise_conv2d(torch.zeros(1, 2, 2, 1), torch.zeros(1, 1, 3, 3), 'fast')
