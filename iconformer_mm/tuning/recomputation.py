"""Gradient checkpointing that a host applies from outside its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .attachments import Joint
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
