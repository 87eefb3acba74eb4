import copy

import pytest
import torch
from operator_checks import assert_near, needs_triton, run_compiled, run_interpreted

from iconformer_mm.ops import backends, dynamic_depthwise_conv2d, filter_norm


def definition(raw, gamma, beta, eps):
    """A kernel at a time."""
    out = torch.empty_like(raw)
    for b in range(raw.shape[0]):
        for c in range(raw.shape[1]):
            taps = raw[b, c]
            std = (taps - taps.mean()).square().mean().sqrt()
            out[b, c] = (taps - taps.mean()) / (std + eps) * gamma[c] + beta[c]
    return out


def problem(batch=3, channels=5, size=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (batch, channels, size, size), (channels, size, size), (channels, size, size)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def gradients(function, tensors, grad):
    """What a function returns, and the gradients of its arguments."""
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


@pytest.mark.parametrize('size', [3, 5, 7])
@pytest.mark.parametrize('eps', [1e-5, 0.3])
def test_agrees_with_the_definition(size, eps):
    tensors, grad = problem(size=size), problem(size=size)[0].detach().cos()
    expected = gradients(lambda *args: definition(*args, eps), tensors, grad)
    torch.testing.assert_close(gradients(lambda *args: filter_norm(*args, eps), tensors, grad), expected)


@pytest.mark.parametrize('without', [(), ('numba_norm',)])
def test_first_and_second_derivatives(without, monkeypatch):
    found = backends.find
    monkeypatch.setattr(backends, 'find', lambda name: None if name in without else found(name))
    assert torch.autograd.gradcheck(filter_norm, problem())
    assert torch.autograd.gradgradcheck(filter_norm, problem())
    raw, gamma, beta = problem()
    grad = torch.autograd.grad(filter_norm(raw, gamma, beta.detach()).square().sum(), raw, create_graph=True)[0]
    torch.autograd.grad(grad.sum(), gamma)


def test_kernels_that_are_constant_have_a_gradient():
    """Their deviation is zero, where its square root has no derivative."""
    raw, gamma, beta = problem()
    with torch.no_grad():
        raw[0] = 2.0
        raw[1] = 0.0
    out, grad_raw, grad_gamma, _ = gradients(filter_norm, [raw, gamma, beta], torch.ones_like(raw))
    assert torch.equal(out[:2], beta.detach().expand(2, -1, -1, -1))
    assert torch.isfinite(grad_raw).all() and torch.isfinite(grad_gamma).all()
    # What is left is the scale 1 / eps.
    inner = gamma - gamma.mean(dim=(1, 2), keepdim=True)
    torch.testing.assert_close(grad_raw[:2], (inner / 1e-5).detach().expand(2, -1, -1, -1))


def test_nan_is_not_lost():
    """Loss scaling looks for it."""
    raw, gamma, beta = (tensor.detach() for tensor in problem())
    raw[1, 2, 0, 0] = float('nan')
    out = filter_norm(raw, gamma, beta)
    assert torch.isnan(out[1, 2]).all() and torch.isnan(out).sum() == 9


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_precision(dtype):
    """Of rounded kernels, with factors in float32 as under autocast."""
    raw, gamma, beta = problem(8, 64)
    rounded = [raw.detach().to(dtype), gamma.detach().float(), beta.detach().float()]
    grad = torch.randn_like(rounded[0])
    actual = gradients(filter_norm, [t.requires_grad_() for t in rounded], grad)
    exact = [t.detach().double().requires_grad_() for t in rounded]
    expected = gradients(lambda *args: definition(*args, 1e-5), exact, grad.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert [value.dtype for value in actual] == [dtype, dtype, torch.float32, torch.float32]
    assert_near(actual, expected, tolerance)


@pytest.mark.parametrize('size', [1, 3])
def test_memory_of_parameters_can_still_be_resized(size):
    """FSDP does that; NumPy forbids it of memory that it has seen. Static kernels are parameters, too."""
    tensors = problem(size=size, dtype=torch.float32)
    maps = torch.randn(3, 4, 4, 5, requires_grad=True)
    out = dynamic_depthwise_conv2d(maps, filter_norm(*tensors)) + dynamic_depthwise_conv2d(maps, tensors[0])
    out.sum().backward()
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
        assert tensor.untyped_storage().nbytes() == 0


def test_is_seen_by_a_compiler():
    tensors, grad = problem(), problem()[0].detach()
    compiled = torch.compile(filter_norm, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(gradients(compiled, tensors, grad), gradients(filter_norm, tensors, grad))


def test_empty_batch():
    assert filter_norm(torch.zeros(0, 2, 3, 3), torch.ones(2, 3, 3), torch.ones(2, 3, 3)).shape == (0, 2, 3, 3)


@needs_triton
def test_triton_in_its_interpreter():
    """The kernels run without a GPU, in a process that interprets them from the start."""
    run_interpreted(__file__)


@pytest.mark.parametrize(
    ('batch', 'size', 'dtype'),
    [(3, 3, torch.float64), (37, 3, torch.float32), (2, 5, torch.float32), (2, 3, torch.float16)],
)
def interpreted_triton(batch, size, dtype):
    triton = backends.find('triton_norm')
    raw, gamma, beta = problem(batch, 3, size, dtype)
    with torch.no_grad():
        raw[-1, 0] = 1.0
    # A gradient as it comes out of the dynamic convolution, its channels innermost.
    grad = torch.randn(batch, size, size, 3, dtype=torch.float64).to(dtype).permute(0, 3, 1, 2)
    exact = [t.detach().double().requires_grad_() for t in (raw, gamma, beta)]
    expected = gradients(lambda *args: definition(*args, 1e-2), exact, grad.double())
    # The definition has no derivative where a kernel is constant.
    inner = (grad[-1, 0] * gamma[0]).double()
    expected[1][-1, 0] = (inner - inner.mean()) / 1e-2
    actual = [triton.normalise(raw.detach(), gamma.detach(), beta.detach(), 1e-2)]
    actual += triton.gradients(grad, raw.detach(), gamma.detach(), 1e-2)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    assert all(value.dtype == dtype for value in actual)
    assert_near(actual, expected, tolerance)


@needs_triton
@pytest.mark.parametrize(
    ('batch', 'channels', 'size', 'dtype'),
    [
        (40, 4, 3, torch.float32),  # samples in two goes
        (3, 5, 3, torch.bfloat16),
        (3, 5, 5, torch.float16),
        (33, 3, 7, torch.bfloat16),  # several warps
    ],
)
def test_triton_as_compiled_for_a_gpu(monkeypatch, batch, channels, size, dtype):
    """What the interpreter does not tell: what the compiler makes of the kernels."""
    backend = backends.find('triton_norm')
    run_compiled(monkeypatch, backend, '_normalise', '_differentiate')
    raw, gamma, beta = (t.detach() for t in problem(batch, channels, size, torch.float32))
    raw, grad = raw.to(dtype), torch.randn(batch, size, size, channels).to(dtype).permute(0, 3, 1, 2)
    exact = [t.double().requires_grad_() for t in (raw, gamma, beta)]
    expected = gradients(lambda *args: definition(*args, 1e-2), exact, grad.double())
    actual = [backend.normalise(raw, gamma, beta, 1e-2), *backend.gradients(grad, raw, gamma, 1e-2)]
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    assert_near(actual, expected, tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('size', [3, 7])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_on_a_gpu(size, dtype):
    raw, gamma, beta = problem(40, 64, size)
    rounded = [raw.detach().to(dtype), gamma.detach().float(), beta.detach().float()]
    grad = torch.randn_like(rounded[0])
    exact = [t.double().requires_grad_() for t in copy.deepcopy(rounded)]
    expected = gradients(filter_norm, exact, grad.double())
    actual = gradients(filter_norm, [t.cuda().requires_grad_() for t in rounded], grad.cuda())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert_near(actual, expected, tolerance)
