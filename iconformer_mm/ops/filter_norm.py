"""FilterNorm: kernels normalised over their taps."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from iconformer_mm.compat import is_plain

from . import backends


def _backend(raw: Tensor) -> ModuleType | None:
    """Compiled code for a device; None where there is none, or where somebody is to see the operators."""
    if raw.numel() == 0 or not is_plain(raw):
        return None
    return backends.find('triton_norm' if raw.is_cuda else 'numba_norm')


def _by_operators(raw: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    # Few operators, since each costs more than its arithmetic; the norm, K times std, has a finite
    # gradient at zero, too.
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
        if not torch.is_grad_enabled():
            gradients = ctx.backend.gradients(grad.detach(), raw.detach(), gamma.detach(), ctx.eps)
            return *gradients, None, None
        # To be differentiated once more.
        wanted = [tensor for tensor, need in zip((raw, gamma, beta), ctx.needs_input_grad) if need]
        found = iter(torch.autograd.grad(_by_operators(raw, gamma, beta, ctx.eps), wanted, grad, create_graph=True))
        return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None


def filter_norm(raw: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise kernels over their taps: ``(k - mean(k)) / (std(k) + eps) * gamma + beta``.

    The FilterNorm of decoupled dynamic filters (Zhou et al., CVPR 2021). Mean and standard deviation
    are those of the K * K taps of a channel, in float32 also for kernels in half precision.

    Args:
        raw: Kernels k, (B, C, K, K).
        gamma: Factors, (C, K, K).
        beta: What is added, (C, K, K).
        eps: Added to the standard deviation. Defaults to 1e-5.

    Returns:
        The normalised kernels, (B, C, K, K), in the dtype of ``raw``.
    """
    backend = _backend(raw)
    if backend is None:
        return _by_operators(raw, gamma, beta, eps)
    if torch.is_grad_enabled() and (raw.requires_grad or gamma.requires_grad or beta.requires_grad):
        return _FilterNorm.apply(raw, gamma, beta, eps, backend)
    return backend.normalise(raw.detach(), gamma.detach(), beta.detach(), eps)
