"""Depth-wise convolution with different kernels for every sample.

There is one operator with one derivative and several backends.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from iconformer_mm.compat import is_exporting, is_plain, is_transformed

from . import backends
from .backends import grouped_backend, looped_backend, reference_backend
from .checks import check_tensors

_library = torch.library.Library('iconformer_mm', 'DEF')
_library.define('dynamic_conv(Tensor tokens, Tensor kernels, int height, int width, str backend) -> Tensor')
_library.define(
    'dynamic_conv_kernel_gradient(Tensor grad, Tensor tokens, int size, int height, int width, str backend) -> Tensor'
)
# Computes both gradients at once, without autograd. Double backward uses the two operators above.
_library.define(
    'dynamic_conv_gradients(Tensor grad, Tensor tokens, Tensor kernels, int height, int width, str backend)'
    ' -> (Tensor, Tensor)'
)

_CHOICES = ('auto', *backends.NAMES)


def _check(tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str) -> None:
    """Raise a ValueError unless tokens (B, P + H * W, C), kernels (B, C, K, K), map size and backend are valid."""
    tokens_shape, kernels_shape = tokens.shape, kernels.shape
    if len(tokens_shape) != 3 or len(kernels_shape) != 4:
        raise ValueError(
            'expected tokens (B, N, C) or maps (B, H, W, C) and kernels (B, C, K, K), '
            f'got {tuple(tokens_shape)} and {tuple(kernels_shape)}'
        )
    batch, count, channels = tokens_shape
    kernel_batch, kernel_channels, rows, size = kernels_shape
    if rows != size or size % 2 == 0:
        raise ValueError(f'kernels must be square with an odd size, got {rows} x {size}')
    if kernel_batch != batch or kernel_channels != channels:
        raise ValueError(
            f'{batch} samples with {channels} channels and kernels {tuple(kernels_shape)} (B, C, K, K) '
            'differ in batch size or channels'
        )
    check_tensors('tokens', tokens, kernels=kernels)
    _check_settings(count, height, width, backend)


def _check_settings(count: int, height: int, width: int, backend: str) -> None:
    """Raise a ValueError unless ``count`` tokens can hold the map and the backend is known."""
    for side in (height, width):
        # Compilers and tracers use their own types for sizes.
        if side < 0 if isinstance(side, int) else not isinstance(side, (torch.SymInt, Tensor)):
            raise ValueError(f'height and width must be integers of at least 0, got {height!r} and {width!r}')
    if count < height * width:
        raise ValueError(f'{count} tokens are fewer than those of a map of {height} x {width}')
    if backend not in _CHOICES:
        raise ValueError(f"unknown backend '{backend}', choose from: {', '.join(_CHOICES)}")


def _backend(name: str, tokens: Tensor, height: int, width: int) -> ModuleType:
    """Return the backend with a name. ``'auto'`` selects the fastest available one.

    Empty inputs use the reference backend, because neither libraries nor kernel launches accept empty maps.
    """
    is_empty = height * width == 0 or tokens.numel() == 0
    if name != 'auto':
        found = backends.find(name)
        if found is None:
            extra = "; pip install 'iconformer_mm[cpu]'" if name == 'numba' else ''
            raise RuntimeError(f"backend '{name}' needs the package {name}, which cannot be imported here{extra}")
        backends.check_device(found, tokens)
        return reference_backend if is_empty else found
    if is_empty:
        return reference_backend
    if tokens.is_cuda and tokens.shape[1] * tokens.shape[2] < 2**31:  # Triton's offsets within a sample have 32 bits
        return backends.find('triton') or grouped_backend
    if tokens.device.type == 'cpu':
        # Without Numba, one convolution per sample is faster for large maps.
        without = looped_backend if height * width * tokens.shape[2] >= 2**15 else grouped_backend
        return backends.find('numba') or without
    return grouped_backend


def _correlate(tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str) -> Tensor:
    found = _backend(backend, tokens, height, width)
    return found.correlate(tokens.detach(), kernels.detach(), height, width)


def _kernel_gradient(grad: Tensor, tokens: Tensor, size: int, height: int, width: int, backend: str) -> Tensor:
    found = _backend(backend, tokens, height, width)
    return found.kernel_gradient(grad.detach(), tokens.detach(), size, height, width)


def _gradients(
    grad: Tensor, tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str
) -> tuple[Tensor, Tensor]:
    found = _backend(backend, tokens, height, width)
    return found.gradients(grad.detach(), tokens.detach(), kernels.detach(), height, width)


# Definitions of the operators in torch's own operators, for transforms of torch.func and forward-mode AD.
_DEFINITIONS: dict[str, Callable[..., Tensor]] = {
    'dynamic_conv': reference_backend.correlate,
    'dynamic_conv_kernel_gradient': reference_backend.kernel_gradient,
}


def _operator(name: str, first: Tensor, second: Tensor, *settings: Any) -> Tensor:
    """Call an operator in a backward pass, differentiable again. The backend is the last setting."""
    if is_transformed():
        return _DEFINITIONS[name](first, second, *settings[:-1])
    return getattr(torch.ops.iconformer_mm, name)(first, second, *settings)


class _Correlation(torch.autograd.Function):
    """The filtered tokens, linear in the tokens and in the kernels. Prefix tokens pass through unchanged."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str) -> Tensor:
        ctx.save_for_backward(tokens, kernels)
        ctx.settings = (height, width, backend)
        return _below_autograd('dynamic_conv', tokens, kernels, height, width, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        tokens, kernels = ctx.saved_tensors
        grad_tokens = grad_kernels = None
        if all(ctx.needs_input_grad[:2]) and not torch.is_grad_enabled() and not is_transformed():
            gradients = _below_autograd('dynamic_conv_gradients', grad, tokens, kernels, *ctx.settings)
            return *gradients, None, None, None
        if ctx.needs_input_grad[0]:
            flipped = kernels.flip((2, 3))
            grad_tokens = _operator('dynamic_conv', grad, flipped, *ctx.settings)
        if ctx.needs_input_grad[1]:
            size = kernels.shape[-1]
            grad_kernels = _operator('dynamic_conv_kernel_gradient', grad, tokens, size, *ctx.settings)
        return grad_tokens, grad_kernels, None, None, None


class _KernelGradient(torch.autograd.Function):
    """The gradient of the kernels, linear in the gradient and in the tokens. It ignores their prefix tokens."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, tokens: Tensor, size: int, height: int, width: int, backend: str) -> Tensor:
        ctx.save_for_backward(grad, tokens)
        ctx.settings = (height, width, backend)
        return _below_autograd('dynamic_conv_kernel_gradient', grad, tokens, size, height, width, backend)

    @staticmethod
    def backward(ctx: Any, kernels: Tensor) -> tuple:
        grad, tokens = ctx.saved_tensors
        height, width, _ = ctx.settings
        num_prefix = tokens.shape[1] - height * width

        def without_prefix(values: Tensor, kernels: Tensor) -> Tensor:
            out = _operator('dynamic_conv', values, kernels, *ctx.settings)
            if not num_prefix:
                return out
            return torch.cat((torch.zeros_like(out[:, :num_prefix]), out[:, num_prefix:]), dim=1)

        grad_grad = without_prefix(tokens, kernels) if ctx.needs_input_grad[0] else None
        grad_tokens = without_prefix(grad, kernels.flip((2, 3))) if ctx.needs_input_grad[1] else None
        return grad_grad, grad_tokens, None, None, None, None


_IMPLEMENTATIONS: dict[str, Callable] = {
    'dynamic_conv': _correlate,
    'dynamic_conv_kernel_gradient': _kernel_gradient,
    'dynamic_conv_gradients': _gradients,
}


def _below_autograd(name: str, *args: Any) -> Any:
    """Compute an operator. Plain tensors skip torch's dispatcher, whose overhead exceeds the work."""
    if is_plain(args[0], args[1]):
        return _IMPLEMENTATIONS[name](*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.iconformer_mm, name)(*args)


def _differentiable(name: str, function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """Wrap an operator for autograd. Without anything to differentiate, it skips the autograd function."""

    def call(first: Tensor, second: Tensor, *settings: Any) -> Tensor:
        if is_transformed():
            return _DEFINITIONS[name](first, second, *settings[:-1])
        if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
            return function.apply(first, second, *settings)
        return _below_autograd(name, first, second, *settings)

    return call


_differentiable_correlate = _differentiable('dynamic_conv', _Correlation)
_differentiable_kernel_gradient = _differentiable('dynamic_conv_kernel_gradient', _KernelGradient)


def _check_types(*tensors: Tensor) -> None:
    """Raise a ValueError unless the tensors have the same dtype."""
    if len({tensor.dtype for tensor in tensors}) != 1:
        raise ValueError(f'an operator takes tensors of one dtype, got {", ".join(str(t.dtype) for t in tensors)}')


def _check_correlate(tokens: Tensor, kernels: Tensor, *settings: Any) -> None:
    _check_types(tokens, kernels)
    _check(tokens, kernels, *settings)


def _check_kernel_gradient(grad: Tensor, tokens: Tensor, size: int, *settings: Any) -> None:
    if tokens.dim() != 3 or grad.shape != tokens.shape:
        raise ValueError(
            f'gradient and tokens must both be (B, N, C), got {tuple(grad.shape)} and {tuple(tokens.shape)}'
        )
    if size < 1 or size % 2 == 0:
        raise ValueError(f'kernels must be square with an odd size, got {size} x {size}')
    _check_types(grad, tokens)
    check_tensors('gradient', grad, tokens=tokens)
    _check_settings(tokens.shape[1], *settings)


def _check_gradients(grad: Tensor, tokens: Tensor, kernels: Tensor, *settings: Any) -> None:
    _check_correlate(tokens, kernels, *settings)
    _check_kernel_gradient(grad, tokens, kernels.shape[-1], *settings)


# Argument checks for direct calls of the operators, which bypass the functions below.
_CHECKS: dict[str, Callable[..., None]] = {
    'dynamic_conv': _check_correlate,
    'dynamic_conv_kernel_gradient': _check_kernel_gradient,
    'dynamic_conv_gradients': _check_gradients,
}


def _as_declared(name: str, implementation: Callable) -> Callable:
    """Add the checks to an operator and make its results contiguous, as the meta functions below declare.

    Results of a backend need not be contiguous.
    """

    def call(*args: Any) -> Any:
        _CHECKS[name](*args)
        out = implementation(*args)
        return out.contiguous() if isinstance(out, Tensor) else tuple(tensor.contiguous() for tensor in out)

    return call


for _name, _implementation in _IMPLEMENTATIONS.items():
    _library.impl(_name, _as_declared(_name, _implementation), 'CompositeExplicitAutograd')
_library.impl('dynamic_conv', _as_declared('dynamic_conv', _differentiable_correlate), 'Autograd')
_library.impl(
    'dynamic_conv_kernel_gradient',
    _as_declared('dynamic_conv_kernel_gradient', _differentiable_kernel_gradient),
    'Autograd',
)


def _correlate_meta(tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _kernel_gradient_meta(grad: Tensor, tokens: Tensor, size: int, height: int, width: int, backend: str) -> Tensor:
    return tokens.new_empty(tokens.shape[0], tokens.shape[2], size, size)


def _gradients_meta(
    grad: Tensor, tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), kernels.new_empty(kernels.shape)


# torch.compile needs the shapes of the results.
_library.impl('dynamic_conv', _correlate_meta, 'Meta')
_library.impl('dynamic_conv_kernel_gradient', _kernel_gradient_meta, 'Meta')
_library.impl('dynamic_conv_gradients', _gradients_meta, 'Meta')


def dynamic_depthwise_conv_tokens(
    tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str = 'auto'
) -> Tensor:
    """Apply :func:`dynamic_depthwise_conv2d` to a token sequence.

    Prefix tokens pass through unchanged.

    Args:
        tokens: Tokens, (B, P + H * W, C): P >= 0 prefix tokens, then the patch tokens
            row by row.
        kernels: Kernels, (B, C, K, K) with odd K.
        height: Rows H of patch tokens.
        width: Columns W of patch tokens.
        backend: See :func:`dynamic_depthwise_conv2d`. Defaults to ``'auto'``.

    Returns:
        The filtered tokens, (B, P + H * W, C).

    Raises:
        ValueError: A shape, a dtype, a device or the backend's name is invalid.
        RuntimeError: The backend needs a package that cannot be imported, or another device.
    """
    _check(tokens, kernels, height, width, backend)
    kernels = kernels.to(tokens.dtype)
    if is_plain(tokens, kernels):
        return _differentiable_correlate(tokens, kernels, height, width, backend)
    if is_transformed() or torch.onnx.is_in_onnx_export() or is_exporting():  # they support only torch's own operators
        return reference_backend.correlate(tokens, kernels, height, width)
    return torch.ops.iconformer_mm.dynamic_conv(tokens, kernels, height, width, backend)


def dynamic_depthwise_conv2d(x: Tensor, kernels: Tensor, backend: str = 'auto') -> Tensor:
    """Convolve every channel of every sample with its own kernel.

    ``out[b, h, w, c] = sum_ij kernels[b, c, i, j] * x[b, h + i - K // 2, w + j - K // 2, c]``.
    This is cross-correlation with stride 1 and zero padding ``K // 2``, the adaptive
    convolution of iConFormer (arXiv 2409.02838). It is differentiable any number of times.
    Taps multiply the padding, too. So a tap that is NaN or infinite makes every output of
    its channel non-finite.

    Args:
        x: Feature maps, (B, H, W, C).
        kernels: Kernels, (B, C, K, K) with odd K; cast to the dtype of ``x``.
        backend: ``'numba'`` (CPU, compiled on the first call), ``'triton'`` (CUDA),
            ``'grouped'`` (one grouped convolution), ``'looped'`` (one convolution per sample),
            ``'reference'`` (shifted products), or ``'auto'`` (default), which selects the
            fastest for the device and the shape. The results are equal up to rounding.
            Exported graphs (ONNX, ``torch.export``) always contain the reference. The
            reference also runs under the transforms of ``torch.func``, in forward-mode AD,
            and for empty maps.

    Returns:
        The filtered maps, (B, H, W, C).

    Raises:
        ValueError: A shape, a dtype, a device or the backend's name is invalid.
        RuntimeError: The backend needs a package that cannot be imported, or another device.
    """
    if x.dim() != 4:
        raise ValueError(f'dynamic_depthwise_conv2d expects x (B, H, W, C), got {tuple(x.shape)}')
    height, width = x.shape[1:3]
    out = dynamic_depthwise_conv_tokens(x.flatten(1, 2), kernels, height, width, backend)
    return out.unflatten(1, (height, width))
