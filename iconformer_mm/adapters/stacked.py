"""Several adapters of one kind and shape that run as one, each on its own samples of a batch (ours).

Their weights are stacked once. Samples lie in the order of the adapters, so that a projection is one batched product
over views of the tokens: nothing is gathered. Scales are folded into the stacked weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iconformer_mm.ops import dynamic_depthwise_conv_tokens, filter_norm

from .adaptformer import AdaptFormerAdapter
from .base import Adapter, TokenGrid
from .convpass import ConvpassAdapter
from .houlsby import HoulsbyAdapter
from .icon import ICoNAdapter, filter_windows
from .lorand import LoRandAdapter
from .mona import MonaAdapter
from .weights import DoRAAdapter, LoRAAdapter, place_rows, with_factors


class Segments:
    """Which samples of a batch go through which adapter. Samples lie in the order of the adapters.

    Args:
        counts: Number of samples of each adapter, at least 1.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self.total = sum(counts)
        # Neighbouring adapters with the same number of samples run as one product: first adapter, last + 1, samples.
        self._runs: list[tuple[int, int, int]] = []
        for count, group in groupby(enumerate(self.counts), key=lambda item: item[1]):
            indices = [index for index, _ in group]
            self._runs.append((indices[0], indices[-1] + 1, count))

    def apply(self, x: Tensor, function: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Apply a function to the rows of adapters that have the same number of samples.

        Args:
            x: (samples * m, ...), m rows for each sample.
            function: Takes (adapters, rows of one, ...) and which adapters these are. It returns the same, with
                other sizes from the third dimension on.

        Returns:
            The results in the order of the rows, (samples * m, ...).
        """
        each = len(x) // self.total
        outputs, row = [], 0
        for first, last, count in self._runs:
            end = row + (last - first) * count * each
            part = x[row:end].unflatten(0, (last - first, -1))
            outputs.append(function(part, slice(first, last)).flatten(0, 1))
            row = end
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def spread(self, values: Tensor, rows: int) -> Tensor:
        """Repeat the value of each adapter for its rows, (adapters, ...) to (rows, ...)."""
        each = rows // self.total
        if len(self._runs) == 1:
            return values.repeat_interleave(self.counts[0] * each, dim=0)
        repeats = torch.tensor(self.counts, device=values.device) * each
        return values.repeat_interleave(repeats, dim=0, output_size=rows)


def multiply(x: Tensor, matrices: Tensor, bias: Tensor | None, segments: Segments) -> Tensor:
    """Multiply the rows of each adapter by its matrix.

    Args:
        x: (rows, ..., in).
        matrices: (adapters, out, in).
        bias: (adapters, out), or None.
        segments: Which rows belong to which adapter.

    Returns:
        (rows, ..., out).
    """

    def product(part: Tensor, which: slice) -> Tensor:
        vectors = part.flatten(1, -2)
        weights = matrices[which].transpose(1, 2)
        out = torch.bmm(vectors, weights) if bias is None else torch.baddbmm(bias[which, None], vectors, weights)
        return out.unflatten(1, part.shape[1:-1])

    return segments.apply(x, product)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.detach() for tensor in tensors])


class StackedProjection:
    """Several :class:`~iconformer_mm.adapters.base.Projection` of one shape."""

    def __init__(self, projections: Sequence[Any], segments: Segments, scales: Sequence[Any] | None = None) -> None:
        self.segments = segments
        self.weight = _stack([p.weight for p in projections])
        self.bias = None if projections[0].bias is None else _stack([p.bias for p in projections])
        if scales is not None:
            dtype, device = self.weight.dtype, self.weight.device
            factors = _stack([torch.as_tensor(scale, dtype=dtype, device=device) for scale in scales])
            self.weight = self.weight * factors[:, None, None]
            self.bias = None if self.bias is None else self.bias * factors[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        """Project the last dimension, (rows, ..., in) to (rows, ..., out)."""
        return multiply(x, self.weight, self.bias, self.segments)


class StackedConvolution:
    """Several :class:`~iconformer_mm.adapters.base.MapConvolution` of one shape, as one grouped convolution."""

    def __init__(self, convolutions: Sequence[Any], segments: Segments) -> None:
        self.segments = segments
        self.groups = convolutions[0].groups
        self.weight = _stack([c.weight for c in convolutions])
        self.bias = _stack([c.bias for c in convolutions])

    def __call__(self, maps: Tensor) -> Tensor:
        """Convolve, (rows, H, W, c) to (rows, H, W, c)."""
        size = self.weight.shape[-1]
        if size == 1 and self.groups == 1:
            return multiply(maps, self.weight.flatten(2), self.bias, self.segments)

        def convolve(part: Tensor, which: slice) -> Tensor:
            x = part.permute(1, 0, 4, 2, 3)  # (rows of one, adapters, c, H, W)
            weight, bias = self.weight[which].flatten(0, 1), self.bias[which].flatten()
            out = F.conv2d(x.flatten(1, 2), weight, bias, padding=size // 2, groups=len(part) * self.groups)
            return out.view(x.shape).permute(1, 0, 3, 4, 2)

        return self.segments.apply(maps, convolve)


class StackedBottleneck:
    """Several adapters of one :class:`~iconformer_mm.adapters.base.BottleneckAdapter` class, settings and shape.

    Args:
        adapters: The adapters, in evaluation mode.
        segments: Which samples go through which.
    """

    def __init__(self, adapters: Sequence[Any], segments: Segments) -> None:
        self.like = adapters[0]
        self.segments = segments
        self.down = StackedProjection([a.down for a in adapters], segments)
        scaled = not all(a._unscaled for a in adapters)
        self.up = StackedProjection([a.up for a in adapters], segments, [a.scale for a in adapters] if scaled else None)

    def transform(self, z: Tensor, grid: Any) -> Tensor:
        """Transform the bottleneck tokens, (rows, N, c) to (rows, N, c)."""
        return z

    def __call__(self, tokens: Tensor, grid: Any = None) -> Tensor:
        """Compute the scaled delta, (rows, N, d)."""
        if self.like.needs_grid:
            grid.check(tokens)
        return self.up(self.like.activation(self.transform(self.down(tokens), grid)))


class StackedConvpass(StackedBottleneck):
    """Several :class:`~iconformer_mm.adapters.ConvpassAdapter`."""

    def __init__(self, adapters: Sequence[Any], segments: Segments) -> None:
        super().__init__(adapters, segments)
        self.conv = StackedConvolution([a.conv for a in adapters], segments)

    def transform(self, z: Tensor, grid: TokenGrid) -> Tensor:
        """Activate and convolve."""
        z = self.like.activation(z)
        out = Adapter.on_maps(self.conv, z, grid)
        prefix = grid.num_prefix_tokens
        if not prefix:
            return out
        centre = self.conv.weight.shape[-1] // 2
        pixel = multiply(z[:, :prefix], self.conv.weight[..., centre, centre], self.conv.bias, self.segments)
        return torch.cat((pixel, out[:, prefix:]), dim=1)


class StackedMona(StackedBottleneck):
    """Several :class:`~iconformer_mm.adapters.MonaAdapter`."""

    def __init__(self, adapters: Sequence[Any], segments: Segments) -> None:
        super().__init__(adapters, segments)
        self.norms = [_stack([getattr(a.norm, name) for a in adapters]).unsqueeze(1) for name in ('weight', 'bias')]
        self.gammas = [_stack([getattr(a, name) for a in adapters]).unsqueeze(1) for name in ('gamma', 'gammax')]
        self.convs = [
            StackedConvolution(convs, segments) for convs in zip(*(list(a.convs) for a in adapters), strict=True)
        ]
        self.projector = StackedConvolution([a.projector for a in adapters], segments)

    def _filter(self, maps: Tensor) -> Tensor:
        maps = sum(conv(maps) for conv in self.convs) / len(self.convs) + maps
        return self.projector(maps) + maps

    def transform(self, z: Tensor, grid: TokenGrid) -> Tensor:
        """Filter the patch tokens."""
        return Adapter.on_maps(self._filter, z, grid)

    def __call__(self, tokens: Tensor, grid: Any = None) -> Tensor:
        """Compute the delta, (rows, N, d)."""
        norm = self.like.norm
        values = [self.segments.spread(value, len(tokens)) for value in (*self.norms, *self.gammas)]
        normed = torch.addcmul(values[1], F.layer_norm(tokens, norm.normalized_shape, eps=norm.eps), values[0])
        return super().__call__(normed * values[2] + tokens * values[3], grid)


class StackedICoN(StackedBottleneck):
    """Several :class:`~iconformer_mm.adapters.ICoNAdapter`."""

    def __init__(self, adapters: Sequence[Any], segments: Segments) -> None:
        super().__init__(adapters, segments)
        nets = [a.icon for a in adapters]
        self.net = nets[0]
        self.taps = self.generator = self.hidden = self.gamma = self.beta = None
        if self.net.kernel == 'static':
            self.taps = _stack([net.taps for net in nets])
        else:
            self.generator = StackedProjection([net.generator for net in nets], segments)
            if self.net.hidden is not None:
                self.hidden = StackedProjection([net.hidden for net in nets], segments)
        if self.net.kernel_norm is not None:
            self.gamma, self.beta = _stack([net.gamma for net in nets]), _stack([net.beta for net in nets])
            self.one = torch.ones_like(self.gamma[0])
            self.zero = torch.zeros_like(self.gamma[0])

    def kernels(self, maps: Tensor, window: int | None = None) -> Tensor:
        """Generate the kernels of maps (rows, H, W, c), (rows or rows * windows, c, K, K)."""
        net = self.net
        if self.taps is not None:
            kernels = self.segments.spread(self.taps, len(maps))
        else:
            assert self.generator is not None
            context = net.pool(maps, window)
            if self.hidden is not None:
                context = F.gelu(self.hidden(context))
            kernels = self.generator(context).view(-1, net.channels, net.kernel_size, net.kernel_size)
        if self.gamma is None or self.beta is None:
            return kernels
        normed = filter_norm(kernels, self.one, self.zero, net.eps)
        gamma, beta = (self.segments.spread(value, len(kernels)) for value in (self.gamma, self.beta))
        return torch.addcmul(beta, normed, gamma)

    def transform(self, z: Tensor, grid: TokenGrid) -> Tensor:
        """Filter the patch tokens."""
        window = self.like.window_size
        if window is not None:
            return Adapter.on_maps(lambda maps: filter_windows(maps, self.kernels(maps, window), window), z, grid)
        kernels = self.kernels(z[:, grid.num_prefix_tokens :].unflatten(1, (grid.height, grid.width)))
        return dynamic_depthwise_conv_tokens(z, kernels, grid.height, grid.width)


class StackedLoRand:
    """Several :class:`~iconformer_mm.adapters.LoRandAdapter`, as their two projections."""

    def __init__(self, adapters: Sequence[Any], segments: Segments) -> None:
        self.segments = segments
        self.down = _stack([a.projections()[0].t() for a in adapters])
        self.up = _stack([a.projections()[1].t() for a in adapters])
        self.down_bias = _stack([a.down_bias for a in adapters])
        self.up_bias = _stack([a.up_bias for a in adapters])

    def __call__(self, tokens: Tensor, grid: Any = None) -> Tensor:
        """Compute the delta, (rows, N, d)."""
        z = F.gelu(multiply(tokens, self.down, self.down_bias, self.segments))
        return multiply(z, self.up, self.up_bias, self.segments)


class StackedLoRA:
    """Several :class:`~iconformer_mm.adapters.LoRAAdapter` of the same maps and rank."""

    def __init__(self, adapters: Sequence[Any], segments: Segments) -> None:
        self.adapters = adapters
        self.segments = segments
        self.targets = adapters[0].targets
        self.down = {role: _stack([a.a[role] for a in adapters]) for role in adapters[0].a}
        self.up = {role: _stack([a.b[role] * a.scale for a in adapters]) for role in adapters[0].b}

    def path(self, name: str, layer: Any, x: Tensor) -> Tensor:
        """Run a layer's paths on its input, see :meth:`~iconformer_mm.adapters.LoRAAdapter.path`."""
        is_map = isinstance(layer, nn.Conv2d)
        values = x.flatten(2).transpose(1, 2) if is_map else x

        def run(role: str) -> Tensor:
            z = multiply(values, self.down[role], None, self.segments)
            piece = multiply(z, self.up[role], None, self.segments)
            return piece.transpose(1, 2).unflatten(2, x.shape[2:]) if is_map else piece

        return place_rows(self.targets[name], layer, x, run)

    def add_path(self, name: str, layer: Any, x: Tensor, out: Tensor) -> Tensor:
        """Add a layer's paths to its output."""
        return out + self.path(name, layer, x)


class StackedDoRA(StackedLoRA):
    """Several :class:`~iconformer_mm.adapters.DoRAAdapter` of the same maps and rank."""

    def __init__(self, adapters: Sequence[Any], segments: Segments) -> None:
        super().__init__(adapters, segments)
        self._factors: dict[str, Tensor] = {}

    def add_path(self, name: str, layer: Any, x: Tensor, out: Tensor) -> Tensor:
        """Turn a layer's output into its output with the adapted weights."""
        if name not in self._factors:  # the weight is the same in every call
            self._factors[name] = _stack([a.factors(name, layer) for a in self.adapters])
        factors = self.segments.spread(self._factors[name], len(out))
        ones = [1] * (out.dim() - 2)
        shape = (len(out), -1, *ones) if isinstance(layer, nn.Conv2d) else (len(out), *ones, factors.shape[1])
        return with_factors(layer, out, self.path(name, layer, x), factors.view(shape))


class Looped:
    """Adapters of an unknown class, one after the other, each on its own samples."""

    def __init__(self, adapters: Sequence[Any], segments: Segments) -> None:
        self.adapters = adapters
        self.segments = segments

    def _each(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        counts = [count * (len(tensors[0]) // self.segments.total) for count in self.segments.counts]
        parts = zip(self.adapters, *(tensor.split(counts) for tensor in tensors), strict=True)
        return torch.cat([function(adapter, *part) for adapter, *part in parts])

    def __call__(self, tokens: Tensor, grid: Any = None) -> Tensor:
        """Compute the deltas, (rows, N, d)."""
        return self._each(lambda adapter, part: adapter(part, grid), tokens)

    def add_path(self, name: str, layer: Any, x: Tensor, out: Tensor) -> Tensor:
        """Add a layer's paths to its output."""
        return self._each(lambda adapter, *parts: adapter.add_path(name, layer, *parts), x, out)


# By exact class: a subclass may compute something else.
STACKED: dict[type, Callable[[Sequence[Any], Segments], Any]] = {
    AdaptFormerAdapter: StackedBottleneck,
    ConvpassAdapter: StackedConvpass,
    DoRAAdapter: StackedDoRA,
    HoulsbyAdapter: StackedBottleneck,
    ICoNAdapter: StackedICoN,
    LoRAAdapter: StackedLoRA,
    LoRandAdapter: StackedLoRand,
    MonaAdapter: StackedMona,
}
# What may differ between adapters that run as one: scales are folded into weights, and nothing is dropped.
_MAY_DIFFER = ('scale', 'p', 'training')


def kind_of(adapter: nn.Module) -> tuple:
    """What adapters have in common that can run as one: class, settings, and the shapes of their parameters."""
    settings = [
        (path, type(module), name, value)
        for path, module in adapter.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, int, float, str, tuple, type(None)))
        and not name.startswith('_')
        and name not in _MAY_DIFFER
    ]
    shapes = [(name, p.shape, p.dtype) for name, p in adapter.named_parameters() if name != 'scale']
    return (type(adapter), *settings, *shapes)


def stack(adapters: Sequence[nn.Module], counts: Sequence[int]) -> Any:
    """Make one adapter of several, for batches in which each has its own samples.

    Args:
        adapters: Adapters of one kind (:func:`kind_of`), in evaluation mode.
        counts: Number of samples of each. They lie in the order of the adapters.

    Returns:
        What runs as an adapter, as ``adapter(tokens, grid)`` or ``adapter.add_path(...)``. A batch may have several
        rows for each sample, such as windows, next to one another. It holds copies of the weights, except for
        adapters of classes that are not known here. A single adapter is returned as it is.
    """
    if len(adapters) == 1:
        return adapters[0]
    return STACKED.get(type(adapters[0]), Looped)(adapters, Segments(counts))
