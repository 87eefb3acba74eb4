"""Low-rank paths parallel to the linear layers of a block."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from iconformer_mm.adapters import LoRAAdapter, TokenGrid

from ..calls import Frame, Passage, run_in_frame
from ..replacement import parameter_of, with_values
from ..sites import Site
from ..structure import reads_weight
from .base import Attachment, BlockAttachment, WeightMergingAttachment
from .weights import merged_weights


class LowRankAttachment(WeightMergingAttachment, BlockAttachment):
    """Runs the linear layers of a block with parallel low-rank paths.

    If the block calls a layer, the layer keeps its weight in any precision. The output of the path
    is added to its output. Some blocks read a layer's weight instead
    (``F.linear(x, self.qkv.weight, ...)``): BEiT, EVA-02, Swin V2 and ``nn.MultiheadAttention``. They
    run as a view whose weight is the sum of the weight and the product of the path. This is the
    same linear map.

    Args:
        site: The block.
        adapter: The low-rank paths.

    Raises:
        ValueError: The paths have dropout, but the block reads a weight instead of calling the layer.
    """

    def __init__(self, site: Site, adapter: LoRAAdapter) -> None:
        super().__init__(site, {'adapter': adapter})
        self.weight_names = adapter.names
        called = [name for name in adapter.names if _is_called(site.block, name)]
        self._made = tuple(name for name in adapter.names if name not in called)
        if self._made and adapter.dropout.p > 0:
            raise ValueError(
                f'{site.family.name} blocks ({site.family.block}) read the weight {self._made[0]} instead of calling '
                'its layer, so dropout cannot be applied to the input of the path; set dropout=0'
            )
        self.handlers = {
            self.path(_owner(name)): Passage(
                (partial(_see_input, name),), (partial(self._add_path, name, site.block.get_submodule(_owner(name))),)
            )
            for name in called
        }

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the weights that the block reads itself, so that no path can run beside them."""
        return self._made

    def _add_path(self, name: str, layer: nn.Module, frame: Frame, out: Tensor) -> Tensor:
        """Add the output of a layer's path to that of the layer."""
        return self.adapter(frame, 'adapter').add_path(name, layer, frame.values.pop(name), out)

    def begin(self, x: Tensor, grid: TokenGrid | None = None, adapters: Mapping[str, Any] | None = None) -> Frame:
        """Begin a call of the block with its residual stream."""
        return Frame(self.handlers, grid, adapters=adapters)

    def end(self, frame: Frame, out: Tensor) -> Tensor:
        """Return the block's output, which has the paths."""
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block with the paths."""
        return self.joint.run(self._run_block, *args, **kwargs)

    def _run_block(self, *args: Any, **kwargs: Any) -> Any:
        host_forward = self.joint.host_forward
        if self._made:
            weights = {name: parameter_of(self.module, name) for name in self._made}
            host_forward = with_values(self.module, self.part('adapter')(weights)).forward
        return run_in_frame(Frame(self.handlers), host_forward, *args, **kwargs)

    @torch.no_grad()
    def merged_weights(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Return the parameter and the merged value of each weight."""
        return merged_weights(self.module, self.adapters['adapter'], self.weight_names)


class LinearAttachment(WeightMergingAttachment, Attachment):
    """Runs one linear layer with parallel low-rank paths, in towers without known blocks.

    Args:
        name: Name of the layer in the tower.
        layer: The layer, which is called.
        kind: Kind of the layer, for display.
        adapter: The low-rank paths.
    """

    def __init__(self, name: str, layer: nn.Module, kind: str, adapter: LoRAAdapter) -> None:
        super().__init__(name, layer, kind, {'adapter': adapter})
        self.weight_names = adapter.names

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer, and add the paths to its output."""
        return self.joint.run(self._run, *args, **kwargs)

    def _run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        (weight,) = self.weight_names
        out = self.joint.host_forward(x, *args, **kwargs)
        return self.part('adapter').add_path(weight, self.module, x, out)

    @torch.no_grad()
    def merged_weights(self) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """Return the parameter and the merged value of the weight."""
        return merged_weights(self.module, self.adapters['adapter'], self.weight_names)


def _see_input(name: str, frame: Frame, x: Tensor) -> Tensor:
    """Keep the input of a layer for its path."""
    frame.values[name] = x
    return x


def _owner(weight: str) -> str:
    return weight.rpartition('.')[0]


def _is_called(block: nn.Module, weight: str) -> bool:
    """Whether a weight belongs to a linear layer that the block calls."""
    layer = block.get_submodule(_owner(weight))
    if isinstance(layer, nn.Conv2d):
        is_linear = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1
    else:
        is_linear = isinstance(layer, nn.Linear)
    return is_linear and weight.endswith('.weight') and not reads_weight(block, _owner(weight).rpartition('.')[2])
