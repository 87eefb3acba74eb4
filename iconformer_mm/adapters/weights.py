"""Adapters of linear layers and other weights: low-rank paths, scales, differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import check_count, check_flag, check_number


class WeightAdapter(nn.Module):
    """Contract: ``forward(weights)`` computes new weights and leaves the host's weights unchanged.

    Attributes:
        names: Names of the weights that the adapter reads and replaces.
    """

    names: tuple[str, ...]

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Compute the weights to run with.

        Args:
            weights: The host's weights, by :attr:`names`.

        Returns:
            The new weights, with the same names and shapes.
        """
        raise NotImplementedError


def _key(name: str) -> str:
    """Turn a weight's name into a parameter name, which must not contain dots."""
    return name.replace('.', '_')


class DeltaAdapter(WeightAdapter):
    """Adds a learned difference to each weight. The difference starts at zero.

    Training the difference is equivalent to training the weight, except for weight
    decay: it pulls towards the pre-trained value instead of zero (ours).

    Args:
        shapes: Shapes of the weights by name.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.names = tuple(shapes)
        self.deltas = nn.ParameterDict({_key(name): torch.zeros(*shape) for name, shape in shapes.items()})

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the differences to the weights."""
        return {name: weights[name] + self.deltas[_key(name)] for name in self.names}


@dataclass(frozen=True)
class Target:
    """A linear map within a host's weight.

    Attributes:
        weight: Name of the weight. Its first dimension is the output.
        role: Role of the map in the block: ``'q'``, ``'k'``, ``'v'``, ``'o'``, ``'fc1'`` or ``'fc2'``.
        rows: Half-open range of the map's rows in each group. Several maps may share one weight.
        in_features: Input channels of the map.
        groups: Number of groups of rows, such as heads that each have q, k and v in adjacent rows. All maps of a
            weight have the same number. Defaults to 1.
    """

    weight: str
    role: str
    rows: tuple[int, int]
    in_features: int
    groups: int = 1

    @property
    def num_rows(self) -> int:
        """Number of the map's rows in all groups."""
        return (self.rows[1] - self.rows[0]) * self.groups


class LoRAAdapter(WeightAdapter):
    """Adds a low-rank path to linear maps (LoRA, Hu et al., ICLR 2022).

    ``W x + s B A drop(x)``. ``A`` (rank, in) starts Kaiming-uniform and ``B`` (out, rank) at
    zero. The factor ``s`` is ``alpha / rank``, or ``alpha / sqrt(rank)`` if rank-stabilised
    (rsLoRA, Kalajdzievski, 2023, arXiv 2312.03732). As a weight adapter it computes ``W + s B A``.

    Args:
        targets: The linear maps to adapt.
        rank: Rank of the path.
        alpha: Factor of the path before division by the rank, above 0.
        dropout: Dropout probability of the path's input, below 1. Defaults to 0.
        rank_stabilized: Whether s is ``alpha / sqrt(rank)``. Defaults to False.

    Raises:
        ValueError: ``rank`` is not a positive integer, ``alpha`` is not a finite number above 0,
            ``dropout`` is not in [0, 1), or ``rank_stabilized`` is not True or False.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__()
        check_count('rank', rank)
        check_number('alpha', alpha, above=0)
        check_number('dropout', dropout, low=0, below=1)
        check_flag('rank_stabilized', rank_stabilized)
        self.scale = alpha / (math.sqrt(rank) if rank_stabilized else rank)
        self.dropout = nn.Dropout(dropout)
        self.targets: dict[str, list[Target]] = {}
        for target in sorted(targets, key=lambda target: (target.weight, target.rows)):
            self.targets.setdefault(target.weight, []).append(target)
        self.names = tuple(self.targets)
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        for target in targets:
            self.a[target.role] = torch.empty(rank, target.in_features)
            self.b[target.role] = torch.zeros(target.num_rows, rank)
            nn.init.kaiming_uniform_(self.a[target.role], a=math.sqrt(5))

    def add_path(self, name: str, layer: nn.Module, x: Tensor, out: Tensor) -> Tensor:
        """Add a layer's low-rank paths to its output.

        Args:
            name: Name of the layer's weight.
            layer: The layer, an ``nn.Linear`` or a 1 x 1 ``nn.Conv2d``.
            x: Input of the layer.
            out: Output of the layer.

        Returns:
            The sum, in the shape of ``out``. Output channels without a target are unchanged.
        """
        return out + self.path(name, layer, x)

    def path(self, name: str, layer: Any, x: Tensor) -> Tensor:
        """Run a layer's paths on its input. The result has the shape of the layer's output."""
        x = self.dropout(x)
        return place_rows(self.targets[name], layer, x, lambda role: self._run(role, layer, x))

    def _run(self, role: str, layer: Any, x: Tensor) -> Tensor:
        """Run the path of one map."""
        down, up = self.a[role], self.b[role]
        if isinstance(layer, nn.Conv2d):
            return F.conv2d(F.conv2d(x, down[:, :, None, None]) * self.scale, up[:, :, None, None])
        return F.linear(F.linear(x, down) * self.scale, up)

    def _map(self, weight: Tensor, role: str) -> Tensor:
        """Adapt the matrix of one linear map, (out, in) to (out, in)."""
        return weight + self.scale * (self.b[role] @ self.a[role])

    def forward(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with their maps adapted."""
        adapted = {}
        for name, weight in weights.items():
            matrix = _by_group(weight.flatten(1), self.targets[name])
            pieces, row = [], 0
            for target in self.targets[name]:
                first, last = target.rows
                mapped = self._map(matrix[:, first:last].flatten(0, 1), target.role)
                pieces += [matrix[:, row:first], mapped.unflatten(0, (target.groups, -1))]
                row = last
            adapted[name] = torch.cat([*pieces, matrix[:, row:]], dim=1).view_as(weight)
        return adapted


def place_rows(targets: Sequence[Target], layer: Any, x: Tensor, path_of: Callable[[str], Tensor]) -> Tensor:
    """Put the outputs of maps into the rows that they have in a layer. The other rows are zero.

    Args:
        targets: The maps of the layer's weight, in the order of their rows.
        layer: The layer, an ``nn.Linear`` or a 1 x 1 ``nn.Conv2d``.
        x: Input of the layer.
        path_of: Runs the path of a map by its role.

    Returns:
        A tensor in the shape of the layer's output.
    """
    dim, outputs = (1, layer.out_channels) if isinstance(layer, nn.Conv2d) else (x.dim() - 1, layer.out_features)
    pieces: list[Tensor] = []
    row, groups = 0, targets[0].groups
    for target in targets:
        piece = path_of(target.role)
        if groups > 1:
            piece = piece.unflatten(dim, (groups, -1))
        first, last = target.rows
        if first > row:
            pieces.append(_zeros(piece, dim + (groups > 1), first - row))
        pieces.append(piece)
        row = last
    if outputs > row * groups:
        pieces.append(_zeros(pieces[-1], dim + (groups > 1), outputs // groups - row))
    path = torch.cat(pieces, dim + (groups > 1)) if len(pieces) > 1 else pieces[0]
    return path.flatten(dim, dim + 1) if groups > 1 else path


def _by_group(matrix: Tensor, targets: Sequence[Target]) -> Tensor:
    """Split the rows of a weight (out, ...) into the groups of its maps, (groups, rows per group, ...)."""
    return matrix.unflatten(0, (targets[0].groups, -1))


def _zeros(like: Tensor, dim: int, size: int) -> Tensor:
    """Return zeros in the shape of another tensor, except for the size of one dimension."""
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(shape)


class DoRAAdapter(LoRAAdapter):
    """LoRA for the direction of a weight, with a separate magnitude (DoRA, Liu et al., ICML 2024).

    ``m * (W + dW) / |W + dW|`` for each row of (out, in), where ``dW`` is LoRA's product. As
    the paper proposes, no gradient flows through the norm. The magnitude is learned
    relative to the pre-trained one, ``m = |W| (1 + magnitude)`` (ours). So the adapter
    can be created without the weights.

    Args:
        targets: The linear maps to adapt.
        rank: Rank of the path.
        alpha: Factor of the path before division by the rank, above 0.
        dropout: Dropout probability of the path's input, below 1. Defaults to 0.
        rank_stabilized: Whether alpha is divided by the square root of the rank. Defaults to False.

    Raises:
        ValueError: An argument is out of its range, see :class:`LoRAAdapter`.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
    ) -> None:
        super().__init__(targets, rank, alpha, dropout, rank_stabilized)
        self.magnitude = nn.ParameterDict({t.role: torch.zeros(t.num_rows) for t in targets})

    def _factor(self, weight: Tensor, role: str) -> Tensor:
        """Return the factors of the rows of ``W + dW``, (out,)."""
        with torch.no_grad():  # at least in single precision; autograd does not keep the matrices
            weight = weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight
            moved = super()._map(weight, role).norm(dim=1).clamp_min(1e-12)
            # Equal norms give exactly one, so the adapter starts at the pre-trained weight.
            ratio = weight.norm(dim=1).clamp_min(1e-12) / moved
        return ratio.to(self.magnitude[role].dtype) * (1 + self.magnitude[role])

    def _map(self, weight: Tensor, role: str) -> Tensor:
        return super()._map(weight, role) * self._factor(weight, role).unsqueeze(1)

    def add_path(self, name: str, layer: Any, x: Tensor, out: Tensor) -> Tensor:
        """Turn a layer's output into its output with the adapted weight; see :meth:`LoRAAdapter.add_path`."""
        return with_factors(layer, out, self.path(name, layer, x), self.factors(name, layer))

    def factors(self, name: str, layer: Any) -> Tensor:
        """Return the factors of a layer's outputs, (out,). They are one for outputs without a target."""
        matrix = _by_group(layer.weight.detach().flatten(1), self.targets[name])
        factors, row = [], 0
        for target in self.targets[name]:
            first, last = target.rows
            factor = self._factor(matrix[:, first:last].flatten(0, 1), target.role).unflatten(0, (target.groups, -1))
            factors += [factor.new_ones(target.groups, first - row), factor]
            row = last
        rest = factors[-1].new_ones(len(matrix), matrix.shape[1] - row)
        return torch.cat([*factors, rest], dim=1).flatten()


def with_factors(layer: Any, out: Tensor, path: Tensor, factor: Tensor) -> Tensor:
    """Return ``factor * (W x + path) + bias``, from the output ``W x + bias`` of a layer.

    Args:
        layer: The layer, an ``nn.Linear`` or a 1 x 1 ``nn.Conv2d``.
        out: Its output.
        path: What is added to the output, in the same shape.
        factor: Factors of the outputs, (out,), or (batch, 1, ..., 1, out) and (batch, out, 1, 1) for each sample.
    """
    bias = layer.bias
    if isinstance(layer, nn.Conv2d):
        factor = factor[:, None, None] if factor.dim() == 1 else factor
        bias = None if bias is None else bias[:, None, None]
    linear = out if bias is None else out - bias
    # In this form, a factor of one and a path of zero leave the output bit-identical.
    return out + (factor.to(out.dtype) * (linear + path) - linear)


class SSFAdapter(WeightAdapter):
    """Scales and shifts the output of layers (SSF, Lian et al., NeurIPS 2022).

    ``scale * (W x + b) + shift`` equals a layer with weight ``scale * W`` and bias
    ``scale * b + shift``. As in the paper's code, scales start at one and shifts at
    zero, both with normal noise. So the injection changes the outputs immediately.

    Args:
        layers: For each layer the name of its weight, the name of its bias, and its number
            of outputs. The name of the bias is None if there is no bias; the layer then
            gets no shift.
        std: Standard deviation of the noise. Defaults to 0.02.

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
        """Scale the weights, and scale and shift the biases."""
        adapted = {}
        for weight, bias in self.layers:
            scale = self.scales[_key(weight)]
            adapted[weight] = weights[weight] * scale.view(-1, *[1] * (weights[weight].dim() - 1))
            if bias:
                adapted[bias] = weights[bias] * scale + self.shifts[_key(weight)]
        return adapted
