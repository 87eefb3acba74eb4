"""FilterNorm: kernels normalised over their taps."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from iconformer_mm.compat import is_plain, is_transformed

from . import backends
from .checks import check_tensors


def _check(raw: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> None:
    """Raise a ValueError unless the arguments are valid and match each other."""
    shape = raw.shape
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(f'filter_norm expects raw kernels (B, C, K, K), got {tuple(shape)}')
    if gamma.shape != shape[1:] or beta.shape != shape[1:]:
        raise ValueError(
            f'gamma and beta must be (C, K, K), here {tuple(shape[1:])}, '
            f'got {tuple(gamma.shape)} and {tuple(beta.shape)}'
        )
    check_tensors('raw', raw, gamma=gamma, beta=beta)
    if not 0 <= eps < math.inf:
        raise ValueError(f'eps must be a finite number of at least 0, got {eps!r}')


def _backend(raw: Tensor, gamma: Tensor, beta: Tensor) -> ModuleType | None:
    """Return the compiled backend for a device; None if there is none or torch has to trace the operators."""
    if not is_plain(raw, gamma, beta) or raw.numel() == 0:
        return None
    return backends.find('triton_norm' if raw.is_cuda else 'numba_norm')


def _by_operators(raw: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    # Few operators, since each costs more than its arithmetic. Unlike std, the norm (K times std) has a
    # finite gradient at zero.
    size = raw.shape[-1]
    taps = raw.double() if raw.dtype == torch.float64 else raw.float()
    taps = taps - taps.mean(dim=(2, 3), keepdim=True)
    norm = torch.linalg.vector_norm(taps, dim=(2, 3), keepdim=True)
    taps = taps / (norm + size * eps)
    return torch.addcmul(beta, taps, gamma, value=size).to(raw.dtype)


class _FilterNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, gamma: Tensor, beta: Tensor, eps: float, backend: ModuleType) -> Tensor:
        ctx.save_for_backward(raw, gamma, beta)
        ctx.eps, ctx.backend = eps, backend
        return backend.normalise(raw.detach(), gamma.detach(), beta.detach(), eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        raw, gamma, beta = ctx.saved_tensors
        if not torch.is_grad_enabled() and not is_transformed():
            gradients = ctx.backend.gradients(grad.detach(), raw.detach(), gamma.detach(), ctx.eps)
            return *gradients, None, None
        # For double backward, or under a transform.
        wanted = [tensor for tensor, need in zip((raw, gamma, beta), ctx.needs_input_grad) if need]
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            out = _by_operators(raw, gamma, beta, ctx.eps)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
        return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None


def filter_norm(raw: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise kernels over their taps: ``(k - mean(k)) / (std(k) + eps) * gamma + beta``.

    This follows the FilterNorm of decoupled dynamic filters (DDF, Zhou et al., CVPR 2021). Mean and standard
    deviation are taken over the K * K taps of a channel. Kernels in half precision are normalised in float32. The
    standard deviation is the population standard deviation, which divides the sum of squares by K * K. The code of
    DDF's authors divides by K * K - 1. Its standard deviation is larger by a factor of sqrt(K² / (K² - 1)), which is
    1.06 for K = 3. A gamma larger by the same factor gives the same kernels, except for the effect of eps.

    Args:
        raw: Raw kernels k, (B, C, K, K).
        gamma: Factors, (C, K, K).
        beta: Offsets, (C, K, K).
        eps: Added to the standard deviation. Defaults to 1e-5.

    Returns:
        The normalised kernels, (B, C, K, K), in the dtype of ``raw``.

    Raises:
        ValueError: A shape, a dtype, a device or ``eps`` is invalid.
    """
    _check(raw, gamma, beta, eps)
    backend = _backend(raw, gamma, beta)
    if backend is None:
        return _by_operators(raw, gamma, beta, eps)
    if torch.is_grad_enabled() and (raw.requires_grad or gamma.requires_grad or beta.requires_grad):
        return _FilterNorm.apply(raw, gamma, beta, eps, backend)
    return backend.normalise(raw.detach(), gamma.detach(), beta.detach(), eps)
