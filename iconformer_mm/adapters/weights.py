"""Adapters that make weights of the host's weights: low rank, scales, differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iconformer_mm.registry import ADAPTERS

from .base import check_count, check_number


class WeightAdapter(nn.Module):
    """Contract: ``forward(weights)`` makes other weights of a host's, which stay as they are.

    Attributes:
        names: Names of the weights that it reads and replaces.
    """

    names: tuple[str, ...]

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Make the weights to run with.

        Args:
            weights: The host's weights of :attr:`names`.

        Returns:
            Weights of the same shapes, by the same names.
        """
        raise NotImplementedError


def _key(name: str) -> str:
    """A weight's name as the name of a parameter, which has no dots."""
    return name.replace('.', '_')


@ADAPTERS.register_module()
class DeltaAdapter(WeightAdapter):
    """Adds a learned difference to each weight, zero at first.

    Training the difference is training the weight, but for weight decay, which
    pulls towards the pre-trained value instead of zero (ours).

    Args:
        shapes: Shapes of the weights by name.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.names = tuple(shapes)
        self.deltas = nn.ParameterDict({_key(name): torch.zeros(*shape) for name, shape in shapes.items()})

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights plus differences."""
        return {name: weights[name] + self.deltas[_key(name)] for name in self.names}


@dataclass(frozen=True)
class Target:
    """A linear map within a host's weight.

    Attributes:
        weight: Name of the weight; as a matrix, its first dimension is the output.
        role: What the map is there: ``'q'``, ``'k'``, ``'v'``, ``'o'``, ``'fc1'`` or ``'fc2'``.
        rows: First and last + 1 of its rows, in a weight that several share.
        in_features: Its input channels.
    """

    weight: str
    role: str
    rows: tuple[int, int]
    in_features: int


@ADAPTERS.register_module()
class LoRAAdapter(WeightAdapter):
    """Adds a product of low rank to linear maps (LoRA, Hu et al., ICLR 2022).

    ``W + alpha / rank * B A`` with ``A`` (rank, in) Kaiming-uniform and ``B`` (out, rank)
    zero. The sum is formed before the weight is used, for a layer of any kind; so
    there is no dropout on the layer's input.

    Args:
        targets: The maps.
        rank: Rank of the product.
        alpha: Over the rank, the factor of the product; above 0.

    Raises:
        ValueError: The rank is not a positive integer, or alpha not a finite number above 0.
    """

    def __init__(self, targets: Sequence[Target], rank: int, alpha: float) -> None:
        super().__init__()
        check_count('rank', rank)
        check_number('alpha', alpha, above=0)
        self.scale = alpha / rank
        self.targets: dict[str, list[Target]] = {}
        for target in sorted(targets, key=lambda target: (target.weight, target.rows)):
            self.targets.setdefault(target.weight, []).append(target)
        self.names = tuple(self.targets)
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        for target in targets:
            self.a[target.role] = torch.empty(rank, target.in_features)
            self.b[target.role] = torch.zeros(target.rows[1] - target.rows[0], rank)
            nn.init.kaiming_uniform_(self.a[target.role], a=math.sqrt(5))

    def _map(self, weight: Tensor, role: str) -> Tensor:
        """The adapted linear map of one, (out, in) to (out, in)."""
        return weight + self.scale * (self.b[role] @ self.a[role])

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights with their maps adapted."""
        adapted = {}
        for name, targets in self.targets.items():
            matrix = weights[name].flatten(1)
            pieces, row = [], 0
            for target in targets:
                first, last = target.rows
                pieces += [matrix[row:first], self._map(matrix[first:last], target.role)]
                row = last
            adapted[name] = torch.cat([*pieces, matrix[row:]]).view_as(weights[name])
        return adapted


@ADAPTERS.register_module()
class DoRAAdapter(LoRAAdapter):
    """LoRA for the direction of a weight, and its magnitude apart (DoRA, Liu et al., ICML 2024).

    ``m * (W + dW) / |W + dW|``, row by row of (out, in), with ``dW`` LoRA's product. As
    the paper proposes, no gradient goes through the norm. The magnitude is
    learned relative to the pre-trained one, ``m = |W| (1 + magnitude)`` (ours), so
    that it need not know the weights when it is made.

    Args:
        targets: The maps.
        rank: Rank of the product.
        alpha: Over the rank, the factor of the product.
    """

    def __init__(self, targets: Sequence[Target], rank: int, alpha: float) -> None:
        super().__init__(targets, rank, alpha)
        self.magnitude = nn.ParameterDict({t.role: torch.zeros(t.rows[1] - t.rows[0]) for t in targets})

    def _map(self, weight: Tensor, role: str) -> Tensor:
        moved = super()._map(weight, role)
        norm = moved.detach().norm(dim=1, keepdim=True).clamp_min(1e-12)
        # Equal norms give one exactly, and so the pre-trained weight at first.
        ratio = weight.norm(dim=1, keepdim=True).clamp_min(1e-12) / norm
        return moved * (ratio * (1 + self.magnitude[role].unsqueeze(1)))


@ADAPTERS.register_module()
class SSFAdapter(WeightAdapter):
    """Scales and shifts the output of layers (SSF, Lian et al., NeurIPS 2022).

    ``scale * (W x + b) + shift`` is the layer with weight ``scale * W`` and bias
    ``scale * b + shift``. As in the paper's code, scales start at one and shifts at
    zero, both with a normal noise of 0.02: the outputs change at once.

    Args:
        layers: Name of each layer's weight, the name of its bias (None without
            one, and then there is no shift), and the number of its outputs.
        std: Standard deviation of the noise.

    Raises:
        ValueError: ``std`` is not a finite number of at least 0.
    """

    def __init__(self, layers: Sequence[tuple[str, str | None, int]], std: float = 0.02) -> None:
        super().__init__()
        check_number('std', std, low=0)
        self.layers = [(weight, bias) for weight, bias, _ in layers]
        self.names = tuple(name for pair in self.layers for name in pair if name)
        self.scales = nn.ParameterDict()
        self.shifts = nn.ParameterDict()
        for weight, bias, outputs in layers:
            self.scales[_key(weight)] = nn.init.normal_(torch.empty(outputs), 1, std)
            if bias:
                self.shifts[_key(weight)] = nn.init.normal_(torch.empty(outputs), 0, std)

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights scaled, biases scaled and shifted."""
        adapted = {}
        for weight, bias in self.layers:
            scale = self.scales[_key(weight)]
            adapted[weight] = weights[weight] * scale.view(-1, *[1] * (weights[weight].dim() - 1))
            if bias:
                adapted[bias] = weights[bias] * scale + self.shifts[_key(weight)]
        return adapted
