"""Gradient checkpointing: what a host applies from outside its blocks, and ours of the layers of a tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from iconformer_mm.compat import left_to_python

from .attachments import Joint, Switch
from .replacement import Replacement
from .routing import Alone
from .sites import Site

# Names of the flags for gradient checkpointing: timm's, and that of MMPretrain's TinyViT and MixMIM.
_FLAGS = ('grad_checkpointing', 'use_checkpoint')


class Recomputation:
    """Takes over gradient checkpointing that a host applies from outside its blocks.

    There, the grid and the adapter of the original call are no longer known, and the first block may get no gradient.
    So the joints of the blocks recompute instead, even if checkpointing is switched on or off later. Other modules
    that a host recomputes with ``use_checkpoint`` are not recomputed.

    Args:
        backbone: The adapted backbone.
        sites: All known blocks of the backbone.
        joint_of: Returns the joint of a block.
    """

    def __init__(self, backbone: nn.Module, sites: list[Site], joint_of: Callable[[nn.Module], Joint]) -> None:
        self.joint_of = joint_of
        self.holders: list[tuple[Any, str]] = []  # with the name of its flag
        self.blocks: list[list[nn.Module]] = []  # per holder
        self.is_on: list[bool] = []
        self._setters: list[_Setter] = []
        for name, module in backbone.named_modules():
            blocks = [site.block for site in sites if not name or site.name.startswith(f'{name}.')]
            for flag in _FLAGS:
                if (blocks or flag == 'use_checkpoint') and isinstance(getattr(module, flag, None), bool):
                    self.holders.append((module, flag))
                    self.blocks.append(blocks)
                    self.is_on.append(False)
        if self.holders:
            self.take_over()
            self._setters = [
                _Setter(module, self)
                for module in backbone.modules()
                if callable(getattr(module, 'set_grad_checkpointing', None))
            ]

    def take_over(self) -> None:
        """Switch the host's checkpointing off, and that of the joints on."""
        for index, (holder, flag) in enumerate(self.holders):
            if getattr(holder, flag):
                setattr(holder, flag, False)
                self._switch(index, True)

    def set(self, module: Any, enable: bool) -> None:
        """Run ``set_grad_checkpointing`` of a module, and switch the joints."""
        type(module).set_grad_checkpointing(module, enable)
        self.take_over()
        inside = {id(m) for m in module.modules()}
        for index, (holder, _) in enumerate(self.holders):
            if not enable and id(holder) in inside:
                self._switch(index, False)

    def _switch(self, index: int, on: bool) -> None:
        self.is_on[index] = on
        for block in self.blocks[index]:
            self.joint_of(block).host_with_cp = on

    def release(self) -> None:
        """Give checkpointing back to the host."""
        for setter in self._setters:
            setter.restore()
        for (holder, flag), is_on in zip(self.holders, self.is_on):
            setattr(holder, flag, is_on)


class _Setter:
    """Replaces ``set_grad_checkpointing`` of one module."""

    def __init__(self, module: Any, recomputation: Recomputation) -> None:
        self.module = module
        self.recomputation = recomputation
        module.set_grad_checkpointing = self.set

    def set(self, enable: bool = True) -> None:
        """Switch gradient checkpointing on or off."""
        self.recomputation.set(self.module, enable)

    def restore(self) -> None:
        """Restore the module's own method."""
        del self.module.set_grad_checkpointing


def layer_of(tower: nn.Module, name: str) -> str | None:
    """Return the name of the layer that holds an adapted module: the outermost one in a list of modules.

    Args:
        tower: A tower without known blocks.
        name: Name of the module in it.

    Returns:
        The layer's name, or None if the module is in no layer. A linear layer in a list is no such layer.
    """
    words = name.split('.')
    for end in range(len(words)):
        holder = tower.get_submodule('.'.join(words[:end]))
        if isinstance(holder, nn.ModuleList):
            layer = '.'.join(words[: end + 1])
            return layer if any(True for _ in tower.get_submodule(layer).children()) else None
    return None


class LayerRecomputation(Replacement):
    """Recomputes a layer of a tower in the backward pass, with the adapter of the original call.

    Args:
        layer: The layer, whose modules are adapted.
        switch: Their switch.
    """

    def __init__(self, layer: nn.Module, switch: Switch) -> None:
        super().__init__(layer)
        self.switch = switch
        self.replace()

    @left_to_python
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        if not torch.is_grad_enabled():
            return self.host_forward(*args, **kwargs)
        override = self.switch.override or Alone(self.switch.active)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.switch.overridden(override):
                return self.host_forward(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, **kwargs)
