"""Adapters at a branch that one module of a tower computes, with its residual sum."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from iconformer_mm.adapters import Adapter, TokenGrid

from ..structure import Branch
from .base import Attachment


class ModuleBranchAttachment(Attachment):
    """Adds an adapter's output to the residual sum of attention or an FFN in a tower without known blocks.

    The module computes ``r + branch(x)``, and a norm that follows it is another module, or the last thing it does.
    Where norms follow, the residual r is x. Where they come first, x is the norm of r. The adapter A adds ``A(x)`` with
    ``input='normed'``, ``A(r)`` with ``'residual'``, ``A(branch(x))`` with ``'output'``, and ``A(r + branch(x))`` with
    ``'sum'``.

    Args:
        branch: The module.
        adapter: The adapter.
        input: What the adapter reads: ``'normed'``, ``'residual'``, ``'output'`` or ``'sum'``.
    """

    def __init__(self, branch: Branch, adapter: Adapter, input: str) -> None:
        super().__init__(branch.name, branch.module, type(branch.module).__name__, {'adapter': adapter})
        self.residual = branch.residual
        self.input = input
        self.reads_residual = branch.reads_residual
        self.has_levels = adapter.needs_grid
        # Its place among the arguments after the input.
        names = list(inspect.signature(type(branch.module).forward).parameters)[2:]
        self._position = names.index(self.residual) if self.residual in names else len(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module, and add the adapter's output."""
        return self.joint.run(self._run, *args, **kwargs)

    def _run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given: Any = args[self._position] if self._position < len(args) else kwargs.get(self.residual)
        if self.reads_residual:
            # A norm is the last thing that the module does, so the sum before it is changed at the other end.
            moved = given + self._delta(given, kwargs)
            if self.residual in kwargs:
                kwargs = {**kwargs, self.residual: moved}
            else:
                args = (*args[: self._position], moved, *args[self._position + 1 :])
            return self.joint.host_forward(x, *args, **kwargs)
        out = self.joint.host_forward(x, *args, **kwargs)
        residual = x if given is None else given
        reads = {'normed': x, 'residual': residual, 'sum': out}
        return out + self._delta(out - residual if self.input == 'output' else reads[self.input], kwargs)

    def _delta(self, tokens: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Apply the adapter to tokens (B, N, d), level by level if it needs their grids."""
        adapter = self.part('adapter')
        if not self.has_levels:
            return adapter(tokens, None)
        sizes = [(int(height), int(width)) for height, width in kwargs['spatial_shapes'].tolist()]
        levels = tokens.split([height * width for height, width in sizes], dim=1)
        return torch.cat([adapter(level, TokenGrid(*size)) for level, size in zip(levels, sizes)], dim=1)
