"""What is frozen in a backbone, and keeping it so."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ADAPTER = 'adapter'


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter (host parameters never are)."""
    return ADAPTER in name


class Freezing:
    """Holds every pre-trained parameter of a backbone, and trains its adapters.

    Backbones have ``train()`` methods of their own that switch gradients off
    by ``frozen_stages``, adapters within included, and BatchNorm back on to
    batch statistics. So the state is restored after each ``train()``:
    pre-trained parameters without gradient, BatchNorm on its stored
    statistics, adapters trained in every stage.

    Args:
        backbone: The adapted backbone.
        trained: Names of pre-trained parameters that are trained nevertheless; may change. Defaults to
            None, none.
    """

    def __init__(self, backbone: nn.Module, trained: set[str] | None = None) -> None:
        self.backbone = backbone
        self.trained = set() if trained is None else trained
        self._requires_grad = {n: p.requires_grad for n, p in backbone.named_parameters() if not is_adapter(n)}
        self._replaced = backbone.__dict__.get('train')
        self._host_train = backbone.train
        backbone.__dict__['train'] = self.train
        self.train(backbone.training)

    def train(self, mode: bool = True) -> nn.Module:
        """``backbone.train``, with the freezing kept."""
        self._host_train(mode)
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(is_adapter(name) or name in self.trained)
        for name, module in self.backbone.named_modules():
            if is_adapter(name):
                module.training = mode
            elif isinstance(module, _BatchNorm):
                module.training = False
        return self.backbone

    def release(self) -> None:
        """Give ``train`` and every ``requires_grad`` back as they were."""
        if self._replaced is None:
            del self.backbone.train
        else:
            self.backbone.__dict__['train'] = self._replaced
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])
        self.backbone.train(self.backbone.training)
