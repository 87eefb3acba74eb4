"""Hosts whose layers are quantised."""

from __future__ import annotations

from torch import nn


def find_quantised(backbone: nn.Module) -> list[str]:
    """Names and classes of the layers that torch quantised: their weights are packed, and no gradient passes them.

    Layers of other libraries that keep weights in few bits and compute in floating point are not among them.

    Args:
        backbone: The backbone.
    """
    return [
        f'{name} ({type(module).__name__})'
        for name, module in backbone.named_modules()
        if type(module).__module__.startswith('torch.') and 'quantized' in type(module).__module__.split('.')
    ]


def check_gradients_pass(backbone: nn.Module, method: str) -> None:
    """Refuse a host in which no gradient reaches what is trained.

    Args:
        backbone: The backbone.
        method: Name of the method that would train in it.

    Raises:
        ValueError: Layers are quantised.
    """
    quantised = find_quantised(backbone)
    if quantised:
        raise ValueError(
            f'{len(quantised)} layers of {type(backbone).__name__} are quantised, such as {quantised[0]}, and no '
            f"gradient passes them, so method '{method}' would train on wrong ones; adapt the model that is not "
            "quantised (method 'frozen', which trains the head only, takes this one, too)"
        )
