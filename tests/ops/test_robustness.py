"""What both operators do in odd cases: shapes that do not fit, nothing to compute, NaN, transforms of torch."""

import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from operator_checks import needs_triton, run_interpreted
from torch import func
from torch.autograd import forward_ad

from iconformer_mm.ops import backends, dynamic_depthwise_conv2d, dynamic_depthwise_conv_tokens, filter_norm

BACKENDS = ['auto', 'reference', 'grouped', 'looped', 'numba']
each_backend = pytest.mark.parametrize('backend', BACKENDS)
NAN, INF = float('nan'), float('inf')
OPERATORS = torch.ops.iconformer_mm


def random(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def loop(tokens, kernels, height, width):
    """The definition: zeros around a map, and each output the sum of all K * K products."""
    size, prefix = kernels.shape[-1], tokens.shape[1] - height * width
    half = size // 2
    maps = tokens[:, prefix:].reshape(len(tokens), height, width, -1)
    padded = maps.new_zeros(len(maps), height + 2 * half, width + 2 * half, maps.shape[-1])
    padded[:, half : half + height, half : half + width] = maps
    out = torch.empty_like(maps)
    for h in range(height):
        for w in range(width):
            window = padded[:, h : h + size, w : w + size]
            out[:, h, w] = (window * kernels.permute(0, 2, 3, 1)).sum(dim=(1, 2))
    return torch.cat((tokens[:, :prefix], out.flatten(1, 2)), dim=1)


def run(tokens, kernels, height, width, backend, grad):
    """What the convolution returns, and its gradients."""
    tokens, kernels = tokens.clone().requires_grad_(), kernels.clone().requires_grad_()
    out = dynamic_depthwise_conv_tokens(tokens, kernels, height, width, backend)
    return [out.detach(), *torch.autograd.grad(out, (tokens, kernels), grad)]


def run_loop(tokens, kernels, height, width, grad):
    """By the definition; the gradient of tokens is by its own, the convolution of the gradient with flipped kernels."""
    kernels = kernels.clone().requires_grad_()
    out = loop(tokens, kernels, height, width)
    grad_kernels = torch.autograd.grad(out, kernels, grad)[0]
    return [out.detach(), loop(grad, kernels.detach().flip((2, 3)), height, width), grad_kernels]


# What does not fit


@pytest.mark.parametrize('shape', [(4, 3, 3), (2, 5, 5), (2, 9), (1, 3, 3), (), (3, 3, 2), (2, 2, 3, 3)])
@pytest.mark.parametrize('which', ['gamma', 'beta'])
@pytest.mark.parametrize('grad', [True, False])
@pytest.mark.parametrize('without', [(), ('numba_norm',)])
def test_filter_norm_refuses_other_shapes(shape, which, grad, without, monkeypatch):
    """Compiled code would read what lies behind them in memory."""
    found = backends.find
    monkeypatch.setattr(backends, 'find', lambda name: None if name in without else found(name))
    tensors = dict(raw=torch.zeros(2, 2, 3, 3), gamma=torch.ones(2, 3, 3), beta=torch.ones(2, 3, 3))
    tensors[which] = torch.ones(shape)
    with pytest.raises(ValueError, match=r'gamma and beta must be \(C, K, K\), here \(2, 3, 3\), got'):
        filter_norm(**{name: tensor.requires_grad_(grad) for name, tensor in tensors.items()})


@pytest.mark.parametrize('shape', [(2, 2, 3), (2, 2, 3, 5), (2, 2, 9), (1, 2, 2, 3, 3)])
def test_filter_norm_refuses_what_are_no_kernels(shape):
    with pytest.raises(ValueError, match=r'filter_norm expects raw kernels \(B, C, K, K\), got'):
        filter_norm(torch.zeros(shape), torch.ones(shape[1:]), torch.ones(shape[1:]))


@pytest.mark.parametrize('eps', [NAN, INF, -1e-5])
def test_filter_norm_refuses_a_bad_eps(eps):
    with pytest.raises(ValueError, match='eps must be a finite number of at least 0'):
        filter_norm(torch.zeros(1, 2, 3, 3), torch.ones(2, 3, 3), torch.ones(2, 3, 3), eps)


@pytest.mark.parametrize('dtype', [torch.int64, torch.bool, torch.complex64])
def test_types_that_are_not_floating_point(dtype):
    """A kernel of 0.5 would become 0 beside integers, a complex one lose a part."""
    raw, one = torch.zeros(1, 2, 3, 3), torch.ones(2, 3, 3)
    for tensors in ((raw.to(dtype), one, one), (raw, one.to(dtype), one), (raw, one, one.to(dtype))):
        with pytest.raises(ValueError, match='one of the types float32, bfloat16, float16, float64, got torch'):
            filter_norm(*tensors)
    x = torch.ones(1, 3, 4, 2)
    for pair in ((x.to(dtype), raw), (x, raw.to(dtype))):
        with pytest.raises(ValueError, match='one of the types float32, bfloat16, float16, float64, got torch'):
            dynamic_depthwise_conv2d(*pair)


def test_devices_that_differ():
    raw, one = torch.zeros(1, 2, 3, 3), torch.ones(2, 3, 3)
    with pytest.raises(ValueError, match='raw and beta must be on one device, got cpu and meta'):
        filter_norm(raw, one, one.to('meta'))
    with pytest.raises(ValueError, match='tokens and kernels must be on one device, got cpu and meta'):
        dynamic_depthwise_conv2d(torch.ones(1, 3, 4, 2), raw.to('meta'))


@pytest.mark.parametrize(('height', 'width'), [(-3, -4), (3.0, 4), (-1, 4), (None, 4)])
@each_backend
def test_maps_that_are_none(backend, height, width):
    with pytest.raises(ValueError, match='height and width must be integers of at least 0'):
        dynamic_depthwise_conv_tokens(torch.zeros(1, 12, 2), torch.zeros(1, 2, 3, 3), height, width, backend)


@pytest.mark.parametrize(
    ('name', 'arguments', 'message'),
    [
        ('dynamic_conv', ((1, 12, 2), (1, 5, 3, 3), 3, 4), 'batch size or channels'),
        ('dynamic_conv', ((1, 12, 2), (2, 2, 3, 3), 3, 4), 'batch size or channels'),
        ('dynamic_conv', ((1, 12, 2), (1, 2, 3, 3), 9, 9), '12 tokens are fewer than those of a map of 9 x 9'),
        ('dynamic_conv_kernel_gradient', ((1, 12, 2), (1, 12, 5), 3, 3, 4), r'must both be \(B, N, C\)'),
        ('dynamic_conv_kernel_gradient', ((1, 12, 2), (1, 12, 2), 4, 3, 4), 'odd size'),
        ('dynamic_conv_kernel_gradient', ((1, 12, 2), (1, 12, 2), 3, 7, 4), '12 tokens are fewer'),
        ('dynamic_conv_gradients', ((1, 9, 2), (1, 12, 2), (1, 2, 3, 3), 3, 4), r'must both be \(B, N, C\)'),
        ('dynamic_conv_gradients', ((1, 12, 2), (1, 12, 2), (1, 3, 3, 3), 3, 4), 'batch size or channels'),
    ],
)
@pytest.mark.parametrize('grad', [True, False])
def test_operators_called_as_such_refuse_the_same(name, arguments, message, grad):
    tensors = [torch.zeros(a, requires_grad=grad) if isinstance(a, tuple) else a for a in arguments]
    with pytest.raises(ValueError, match=message):
        getattr(OPERATORS, name)(*tensors, 'numba')


def test_a_view_that_is_negated_in_its_bits():
    """Its memory holds other numbers than it does: what reads memory has to resolve that."""
    x = torch.complex(random(1, 3, 4, 2), random(1, 3, 4, 2, seed=1)).conj().imag
    kernels = torch.complex(random(1, 2, 3, 3), random(1, 2, 3, 3, seed=2)).conj().imag
    gamma, beta = random(2, 3, 3), random(2, 3, 3, seed=3)
    assert x.is_neg() and kernels.is_neg()
    assert torch.equal(dynamic_depthwise_conv2d(x, kernels), dynamic_depthwise_conv2d(x.clone(), kernels.clone()))
    torch.testing.assert_close(filter_norm(kernels, gamma, beta), filter_norm(kernels.clone(), gamma, beta))


# Nothing to compute

EMPTY = [(0, 1, 3, 4, 2), (2, 1, 0, 4, 2), (2, 0, 3, 0, 2), (2, 1, 3, 4, 0), (0, 0, 0, 0, 0), (2, 3, 0, 0, 2)]


def check_empty(shape, size, dtype, backend):
    batch, prefix, height, width, channels = shape
    tokens = random(batch, prefix + height * width, channels, dtype=dtype).requires_grad_()
    kernels = random(batch, channels, size, size, dtype=dtype).requires_grad_()
    out = dynamic_depthwise_conv_tokens(tokens, kernels, height, width, backend)
    assert torch.equal(out, tokens)  # prefix tokens are all there are
    grads = torch.autograd.grad(out.sum(), (tokens, kernels), create_graph=True)
    assert torch.equal(grads[0], torch.ones_like(tokens)) and torch.equal(grads[1], torch.zeros_like(kernels))
    for tensor in (tokens, kernels):
        alone = dynamic_depthwise_conv_tokens(
            *(t if t is tensor else t.detach() for t in (tokens, kernels)), height, width, backend
        )
        torch.autograd.grad(alone.sum(), tensor)
    maps = random(batch, height, width, channels, dtype=dtype).requires_grad_()
    out = dynamic_depthwise_conv2d(maps, kernels, backend)
    assert out.shape == maps.shape
    out.sum().backward()
    assert torch.equal(maps.grad, torch.ones_like(maps)) and kernels.grad.abs().sum() == 0


@each_backend
@pytest.mark.parametrize('shape', EMPTY)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_empty_maps(shape, dtype, backend):
    for size in (1, 3, 5):
        check_empty(shape, size, dtype, backend)


@pytest.mark.parametrize(('batch', 'channels'), [(0, 2), (2, 0), (0, 0)])
@pytest.mark.parametrize('without', [(), ('numba_norm',)])
def test_filter_norm_of_no_kernels(batch, channels, without, monkeypatch):
    found = backends.find
    monkeypatch.setattr(backends, 'find', lambda name: None if name in without else found(name))
    tensors = [torch.ones(shape, requires_grad=True) for shape in ((batch, channels, 3, 3), *[(channels, 3, 3)] * 2)]
    out = filter_norm(*tensors)
    assert out.shape == tensors[0].shape
    out.sum().backward()
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in tensors)


# NaN and infinities


def marks(tensors):
    """Where tensors are NaN, and where infinite."""
    return [(torch.isnan(t).tolist(), torch.isinf(t).tolist()) for t in tensors]


def check_bad_tap(backend, place, bad, shape, size, dtype, gradients=3):
    batch, prefix, height, width, channels = shape
    tokens = random(batch, prefix + height * width, channels, dtype=dtype)
    kernels = random(batch, channels, size, size, dtype=dtype, seed=1)
    kernels[0, 0][place] = bad
    grad = random(*tokens.shape, dtype=dtype, seed=2)
    expected = run_loop(tokens.double(), kernels.double(), height, width, grad.double())
    assert not torch.isfinite(expected[0][0, prefix:, 0]).any()  # each output has a product with that tap
    actual = run(tokens, kernels, height, width, backend, grad)
    assert marks(actual[:gradients]) == marks(expected[:gradients])
    tolerance = dict(rtol=1e-2, atol=1e-2) if dtype == torch.float16 else dict(rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[0][..., 1:].double(), expected[0][..., 1:], **tolerance)


@each_backend
@pytest.mark.parametrize('bad', [NAN, INF, -INF])
@pytest.mark.parametrize('size', [3, 5])
def test_a_tap_that_is_not_finite_marks_the_same_outputs(backend, bad, size):
    for place in ((0, 0), (0, -1), (-1, 0), (-1, -1), (1, 1)):
        for shape in ((2, 1, 4, 6, 2), (1, 0, 1, 1, 1), (1, 2, 1, 5, 3), (1, 0, 5, 2, 3)):
            check_bad_tap(backend, place, bad, shape, size, torch.float32)
        check_bad_tap(backend, place, bad, (2, 1, 4, 6, 2), size, torch.float16)


@each_backend
@pytest.mark.parametrize('bad', [NAN, INF])
@pytest.mark.parametrize('what', ['tokens', 'gradient'])
@pytest.mark.parametrize('size', [1, 3, 5])
def test_other_values_that_are_not_finite(backend, what, bad, size):
    """At corners, at a border and within: outputs and both gradients."""
    for place in (0, 3, 8, 20, 23):
        tokens, kernels, grad = random(2, 24, 2), random(2, 2, size, size, seed=1), random(2, 24, 2, seed=2)
        (tokens if what == 'tokens' else grad)[0, place, 0] = bad
        expected = run_loop(tokens, kernels, 4, 6, grad)
        actual = run(tokens, kernels, 4, 6, backend, grad)
        assert marks(actual) == marks(expected)
        torch.testing.assert_close(actual, expected, equal_nan=True)


# Transforms


def conv_problem(size=3):
    return random(2, 1 + 3 * 4, 2), random(2, 2, size, size, seed=1)


@each_backend
def test_forward_mode_and_batched_gradients(backend):
    """Numerical derivatives against forward-mode AD, reverse mode, both of them batched, and one over the other."""
    tensors = [t.requires_grad_() for t in conv_problem()]
    function = partial(dynamic_depthwise_conv_tokens, height=3, width=4, backend=backend)
    checks = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradcheck(function, tensors, **checks)
    assert torch.autograd.gradgradcheck(function, tensors, check_fwd_over_rev=True, check_batched_grad=True)
    for free in range(2):
        fixed = [t if index == free else t.detach() for index, t in enumerate(tensors)]
        assert torch.autograd.gradcheck(function, fixed, **checks)


@pytest.mark.parametrize('without', [(), ('numba_norm',)])
def test_filter_norm_in_forward_mode_and_batched(without, monkeypatch):
    found = backends.find
    monkeypatch.setattr(backends, 'find', lambda name: None if name in without else found(name))
    tensors = [random(2, 2, 3, 3), random(2, 3, 3, seed=1), random(2, 3, 3, seed=2)]
    tensors = [t.requires_grad_() for t in tensors]
    checks = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradcheck(filter_norm, tensors, **checks)
    assert torch.autograd.gradgradcheck(filter_norm, tensors, check_fwd_over_rev=True, check_batched_grad=True)


@each_backend
def test_a_tangent_is_not_lost_where_nothing_requires_a_gradient(backend):
    """The convolution is linear in each: its tangents are convolutions."""
    (tokens, kernels), (dx, dk) = conv_problem(), (t.cos() for t in conv_problem())
    function = partial(dynamic_depthwise_conv_tokens, height=3, width=4, backend=backend)
    without_prefix = torch.cat((torch.zeros(2, 1, 2, dtype=torch.float64), function(tokens, dk)[:, 1:]), dim=1)
    expected = function(dx, kernels) + without_prefix
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(tokens, dx), forward_ad.make_dual(kernels, dk))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected)
    torch.testing.assert_close(func.jvp(function, (tokens, kernels), (dx, dk))[1], expected)


def test_a_backward_pass_within_forward_mode():
    """What ran before is differentiated with a tangent: it goes into the gradients."""
    tokens, kernels = (t.requires_grad_() for t in conv_problem())
    raw, gamma, beta = (random(*s).requires_grad_() for s in ((2, 2, 3, 3), (2, 3, 3), (2, 3, 3)))
    results = [
        (dynamic_depthwise_conv_tokens(tokens, kernels, 3, 4), [tokens, kernels]),
        (filter_norm(raw, gamma, beta), [raw, gamma]),
    ]
    for out, inputs in results:
        ones, tangent = torch.ones_like(out), torch.ones_like(out).cumsum(1)
        expected = torch.autograd.grad(out, inputs, tangent, retain_graph=True)
        with forward_ad.dual_level():
            found = torch.autograd.grad(out, inputs, forward_ad.make_dual(ones, tangent))
            torch.testing.assert_close([forward_ad.unpack_dual(t).tangent for t in found], list(expected))


@each_backend
def test_transforms_of_the_convolution(backend):
    tokens, kernels = conv_problem()
    function = partial(dynamic_depthwise_conv_tokens, height=3, width=4, backend=backend)

    def loss(tokens, kernels):
        return function(tokens, kernels).sin().sum()

    inputs = [t.clone().requires_grad_() for t in (tokens, kernels)]
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(func.grad(loss, (0, 1))(tokens, kernels), expected)
    torch.testing.assert_close(func.grad(loss, 1)(tokens, kernels), expected[1])
    torch.testing.assert_close(func.vjp(loss, tokens, kernels)[1](torch.ones((), dtype=torch.float64)), expected)
    jacobian = torch.autograd.functional.jacobian(function, (tokens, kernels))
    torch.testing.assert_close(func.jacrev(function, (0, 1))(tokens, kernels), jacobian)
    torch.testing.assert_close(func.jacfwd(function, (0, 1))(tokens, kernels), jacobian)
    hessian = torch.autograd.functional.hessian(loss, (tokens, kernels))
    torch.testing.assert_close(func.hessian(loss, (0, 1))(tokens, kernels), hessian)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        many = func.vmap(function)(torch.stack([tokens, 2 * tokens]), torch.stack([kernels, kernels.cos()]))
        shared = func.vmap(function, in_dims=(None, 0))(tokens, torch.stack([kernels, kernels.cos()]))
        samples = func.vmap(func.grad(lambda t, k: loss(t[None], k[None])))(tokens, kernels)
    torch.testing.assert_close(many, torch.stack([function(tokens, kernels), function(2 * tokens, kernels.cos())]))
    torch.testing.assert_close(shared[1], function(tokens, kernels.cos()))
    torch.testing.assert_close(samples, expected[0])


def test_transforms_of_filter_norm():
    arguments = random(2, 2, 3, 3), random(2, 3, 3, seed=1), random(2, 3, 3, seed=2)
    jacobian = torch.autograd.functional.jacobian(filter_norm, arguments)
    torch.testing.assert_close(func.jacrev(filter_norm, (0, 1, 2))(*arguments), jacobian)
    torch.testing.assert_close(func.jacfwd(filter_norm, (0, 1, 2))(*arguments), jacobian)
    many = func.vmap(filter_norm, in_dims=(0, None, None))(torch.stack([arguments[0]] * 2), *arguments[1:])
    torch.testing.assert_close(many[1], filter_norm(*arguments))


@pytest.mark.skipif(not hasattr(torch.library, 'opcheck'), reason="torch 2.1's compiler takes no transforms")
def test_compiled_transforms():
    tokens, kernels = conv_problem()
    gradient = func.grad(lambda t, k: dynamic_depthwise_conv_tokens(t, k, 3, 4).sin().sum())
    compiled = torch.compile(gradient, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(tokens, kernels), gradient(tokens, kernels))


# Other machines


def test_without_fork():
    """Windows does not have it; the backend's threads work all the same."""
    program = """if True:
        import os, torch, numba, concurrent.futures
        del os.register_at_fork
        from iconformer_mm.ops import dynamic_depthwise_conv2d as conv
        torch.set_num_threads(2)
        x, k = torch.ones(2, 64, 64, 16), torch.ones(2, 16, 3, 3)
        torch.testing.assert_close(conv(x, k, 'numba'), conv(x, k, 'reference'))
    """
    subprocess.run([sys.executable, '-c', program], check=True, timeout=120)


def test_numba_refuses_another_device():
    from iconformer_mm.ops.backends import numba_backend

    with pytest.raises(RuntimeError, match="backend 'numba' needs tensors on the CPU, got them on meta"):
        numba_backend.check_device(torch.ones(1, device='meta'))


@needs_triton
def test_triton_in_its_interpreter():
    run_interpreted(__file__)


def interpreted_triton():
    for shape in EMPTY:
        check_empty(shape, 3, torch.float32, 'triton')
    for size in (3, 5):
        for place in ((0, 0), (-1, -1), (0, -1)):
            for bad in (NAN, INF):
                check_bad_tap('triton', place, bad, (2, 1, 4, 6, 2), size, torch.float32, gradients=2)
                check_bad_tap('triton', place, bad, (1, 0, 1, 3, 2), size, torch.float32, gradients=2)
    # Grids that have room for less than all.
    triton, norm = backends.find('triton'), backends.find('triton_norm')
    tokens, kernels, grad = random(5, 13, 130), random(5, 130, 3, 3, seed=1), random(5, 13, 130, seed=2)
    raw, gamma, beta = random(70, 3, 3, 3), random(3, 3, 3, seed=1), random(3, 3, 3, seed=2)
    whole = run(tokens, kernels, 3, 4, 'triton', grad), norm.normalise(raw, gamma, beta, 1e-5)
    triton.MAX_GRID = norm.MAX_GRID = 2
    parts = run(tokens, kernels, 3, 4, 'triton', grad), norm.normalise(raw, gamma, beta, 1e-5)
    assert all(torch.equal(*pair) for pair in zip(whole[0], parts[0])) and torch.equal(whole[1], parts[1])
    expected = run_loop(tokens, kernels, 3, 4, grad)
    torch.testing.assert_close(parts[0], expected)
    torch.testing.assert_close(triton.kernel_gradient(grad, tokens, 3, 3, 4), expected[2])


@needs_triton
@pytest.mark.parametrize('channels', [2, 64 * 65_535 + 3])
def test_grids_are_those_that_cuda_takes(channels, monkeypatch):
    """65,535 at most along the second and third axis; every sample and every block of channels is done once."""
    triton, norm = backends.find('triton'), backends.find('triton_norm')
    launches = []

    class Record:
        def __getitem__(self, grid):
            return lambda *args, **constants: launches.append((grid, args, constants))

    for module, name in ((triton, '_convolve_3x3'), (triton, '_convolve'), (norm, '_normalise')):
        monkeypatch.setattr(module, name, Record())
    monkeypatch.setattr(triton, 'check_device', lambda tensor: None)
    batch = 150_000 if channels == 2 else 1
    for size in (1, 3):
        launches.clear()
        kernels = torch.empty(1, 1, size, size).expand(batch, channels, -1, -1)
        out = triton.correlate(torch.empty(1, 1, 1).expand(batch, 1, channels), kernels, 1, 1)
        assert out.shape == (batch, 1, channels)
        assert all(max(grid[1:]) <= 65_535 for grid, _, _ in launches)
        assert sum(grid[2] * args[0].shape[2] for grid, args, _ in launches) == batch * channels
        assert all(grid[1] * constants['block'] >= args[0].shape[2] for grid, args, constants in launches)
        assert all(grid[2] == len(args[0]) == len(args[1]) == len(args[3]) for grid, args, _ in launches)
    launches.clear()
    many = 32 * 65_535 + 1
    norm.normalise(torch.empty(1, 1, 1, 1).expand(many, 1, 1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, 1), 1e-5)
    assert [grid[1] for grid, _, _ in launches] == [65_535, 1]
    assert sum(len(args[0]) for _, args, _ in launches) == many


@needs_triton
def test_triton_refuses_a_sample_beyond_its_offsets(monkeypatch):
    triton = backends.find('triton')
    with pytest.raises(
        RuntimeError, match='fewer than 2\\^31 values per sample, got 33554432 tokens of 64 channels; use'
    ):
        triton.correlate(torch.empty(1).expand(1, 2**25, 64), torch.empty(1, 64, 3, 3), 2**12, 2**13)
