"""Depth-wise convolution whose kernels differ from sample to sample: one operator, one derivative, several backends."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from iconformer_mm.compat import is_exporting, is_plain

from . import backends
from .backends import grouped_backend, looped_backend, reference_backend

_library = torch.library.Library('iconformer_mm', 'DEF')
_library.define('dynamic_conv(Tensor tokens, Tensor kernels, int height, int width, str backend) -> Tensor')
_library.define(
    'dynamic_conv_kernel_gradient(Tensor grad, Tensor tokens, int size, int height, int width, str backend) -> Tensor'
)
# Both gradients at once, which autograd does not see: what is to be differentiated again goes through the two above.
_library.define(
    'dynamic_conv_gradients(Tensor grad, Tensor tokens, Tensor kernels, int height, int width, str backend)'
    ' -> (Tensor, Tensor)'
)


def _backend(name: str, tokens: Tensor, height: int, width: int) -> ModuleType:
    """The backend of a name, for ``'auto'`` the fastest one that is there."""
    if name != 'auto':
        found = backends.find(name)
        if found is None:
            raise RuntimeError(f"backend '{name}' needs the package {name}, which cannot be imported here")
        return found
    if tokens.numel() == 0:
        return reference_backend
    if tokens.is_cuda:
        return backends.find('triton') or grouped_backend
    if tokens.device.type == 'cpu':
        # Without Numba: a convolution a sample pays once a map is large.
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


class _Correlation(torch.autograd.Function):
    """Linear in the tokens and in the kernels; prefix tokens pass."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str) -> Tensor:
        ctx.save_for_backward(tokens, kernels)
        ctx.settings = (height, width, backend)
        return _below_autograd('dynamic_conv', tokens, kernels, height, width, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        tokens, kernels = ctx.saved_tensors
        grad_tokens = grad_kernels = None
        if all(ctx.needs_input_grad[:2]) and not torch.is_grad_enabled():
            gradients = _below_autograd('dynamic_conv_gradients', grad, tokens, kernels, *ctx.settings)
            return *gradients, None, None, None
        if ctx.needs_input_grad[0]:
            flipped = kernels.flip((2, 3))
            grad_tokens = torch.ops.iconformer_mm.dynamic_conv(grad, flipped, *ctx.settings)
        if ctx.needs_input_grad[1]:
            size = kernels.shape[-1]
            grad_kernels = torch.ops.iconformer_mm.dynamic_conv_kernel_gradient(grad, tokens, size, *ctx.settings)
        return grad_tokens, grad_kernels, None, None, None


class _KernelGradient(torch.autograd.Function):
    """Linear in the gradient and in the tokens, neither of whose prefix tokens it sees."""

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
            out = torch.ops.iconformer_mm.dynamic_conv(values, kernels, *ctx.settings)
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
    """What an operator computes; by way of torch, which takes longer than the work, only where somebody watches."""
    if is_plain(args[0]):
        return _IMPLEMENTATIONS[name](*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.iconformer_mm, name)(*args)


def _differentiable(name: str, function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """The operator as seen by autograd: without the function where there is nothing to differentiate."""

    def call(first: Tensor, second: Tensor, *settings: Any) -> Tensor:
        if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
            return function.apply(first, second, *settings)
        return _below_autograd(name, first, second, *settings)

    return call


_differentiable_correlate = _differentiable('dynamic_conv', _Correlation)
_differentiable_kernel_gradient = _differentiable('dynamic_conv_kernel_gradient', _KernelGradient)


def _as_declared(implementation: Callable) -> Callable:
    """An operator as compilers are told of it below, with contiguous results; those of a backend need not be."""

    def call(*args: Any) -> Any:
        out = implementation(*args)
        return out.contiguous() if isinstance(out, Tensor) else tuple(tensor.contiguous() for tensor in out)

    return call


for _name, _implementation in _IMPLEMENTATIONS.items():
    _library.impl(_name, _as_declared(_implementation), 'CompositeExplicitAutograd')
_library.impl('dynamic_conv', _as_declared(_differentiable_correlate), 'Autograd')
_library.impl('dynamic_conv_kernel_gradient', _as_declared(_differentiable_kernel_gradient), 'Autograd')


def _correlate_meta(tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str) -> Tensor:
    return tokens.new_empty(tokens.shape)


def _kernel_gradient_meta(grad: Tensor, tokens: Tensor, size: int, height: int, width: int, backend: str) -> Tensor:
    return tokens.new_empty(tokens.shape[0], tokens.shape[2], size, size)


def _gradients_meta(
    grad: Tensor, tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str
) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape), kernels.new_empty(kernels.shape)


# What torch.compile needs to know: shapes.
_library.impl('dynamic_conv', _correlate_meta, 'Meta')
_library.impl('dynamic_conv_kernel_gradient', _kernel_gradient_meta, 'Meta')
_library.impl('dynamic_conv_gradients', _gradients_meta, 'Meta')


def dynamic_depthwise_conv_tokens(
    tokens: Tensor, kernels: Tensor, height: int, width: int, backend: str = 'auto'
) -> Tensor:
    """:func:`dynamic_depthwise_conv2d` over a token sequence whose prefix tokens pass as they are.

    Args:
        tokens: (B, P + H * W, C): P prefix tokens, of which there may be none, and the
            patch tokens row by row.
        kernels: Kernels, (B, C, K, K) with odd K.
        height: Rows H of patch tokens.
        width: Columns W of patch tokens.
        backend: As in :func:`dynamic_depthwise_conv2d`.

    Returns:
        The filtered tokens, (B, P + H * W, C).

    Raises:
        ValueError: A shape or the backend's name does not fit.
        RuntimeError: The backend needs a package that cannot be imported.
    """
    if tokens.dim() != 3 or kernels.dim() != 4:
        raise ValueError(
            'expected tokens (B, N, C) or maps (B, H, W, C) and kernels (B, C, K, K), '
            f'got {tuple(tokens.shape)} and {tuple(kernels.shape)}'
        )
    size = kernels.shape[-1]
    if kernels.shape[-2] != size or size % 2 == 0:
        raise ValueError(f'kernels must be square with an odd size, got {kernels.shape[-2]} x {size}')
    if kernels.shape[0] != tokens.shape[0] or kernels.shape[1] != tokens.shape[2]:
        raise ValueError(
            f'{tokens.shape[0]} samples with {tokens.shape[2]} channels and kernels '
            f'{tuple(kernels.shape)} (B, C, K, K) differ in batch size or channels'
        )
    if tokens.shape[1] < height * width:
        raise ValueError(f'{tokens.shape[1]} tokens are fewer than those of a map of {height} x {width}')
    kernels = kernels.to(tokens.dtype)
    if torch.onnx.is_in_onnx_export() or is_exporting():  # to plain operators, which any runtime knows
        return reference_backend.correlate(tokens, kernels, height, width)
    if backend not in ('auto', *backends.NAMES):
        raise ValueError(f"unknown backend '{backend}', choose from: auto, {', '.join(backends.NAMES)}")
    conv = _differentiable_correlate if is_plain(tokens) else torch.ops.iconformer_mm.dynamic_conv
    return conv(tokens, kernels, height, width, backend)


def dynamic_depthwise_conv2d(x: Tensor, kernels: Tensor, backend: str = 'auto') -> Tensor:
    """Convolve every channel of every sample with a kernel of its own.

    ``out[b, h, w, c] = sum_ij kernels[b, c, i, j] * x[b, h + i - K // 2, w + j - K // 2, c]``:
    cross-correlation with stride 1 and zero padding ``K // 2``, the adaptive
    convolution of iConFormer (arXiv 2409.02838). It is differentiable any number of times.

    Args:
        x: Feature maps, (B, H, W, C).
        kernels: Kernels, (B, C, K, K) with odd K; cast to the dtype of ``x``.
        backend: ``'numba'`` (compiled for the CPU at the first call), ``'triton'`` (CUDA),
            ``'grouped'`` (one grouped convolution), ``'looped'`` (a convolution a sample),
            ``'reference'`` (shifted products), or ``'auto'`` (default), which takes the fastest
            for the device and the shape. They agree but for rounding. Exported graphs
            (ONNX, ``torch.export``) hold the reference whatever is asked for.

    Returns:
        The filtered maps, (B, H, W, C).

    Raises:
        ValueError: A shape or the backend's name does not fit.
        RuntimeError: The backend needs a package that cannot be imported.
    """
    if x.dim() != 4:
        raise ValueError(f'dynamic_depthwise_conv2d expects x (B, H, W, C), got {tuple(x.shape)}')
    height, width = x.shape[1:3]
    out = dynamic_depthwise_conv_tokens(x.flatten(1, 2), kernels, height, width, backend)
    return out.unflatten(1, (height, width))
