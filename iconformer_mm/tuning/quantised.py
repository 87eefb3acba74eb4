"""Hosts whose layers are quantised."""

from __future__ import annotations

from torch import nn


def find_quantised(backbone: nn.Module) -> list[str]:
    """List the names and classes of the layers that torch quantised.

    Their weights are packed, and no gradient passes through them. Quantised layers of other libraries, which
    compute in floating point, are not included.

    Args:
        backbone: The backbone.
    """
    return [
        f'{name} ({type(module).__name__})'
        for name, module in backbone.named_modules()
        if type(module).__module__.startswith('torch.') and 'quantized' in type(module).__module__.split('.')
    ]


def check_gradients_pass(backbone: nn.Module, method: str) -> None:
    """Reject a host in which no gradient reaches the trained parameters.

    Args:
        backbone: The backbone.
        method: Name of the PEFT method.

    Raises:
        ValueError: Layers are quantised.
    """
    quantised = find_quantised(backbone)
    if quantised:
        raise ValueError(
            f'{len(quantised)} layers of {type(backbone).__name__} are quantised, such as {quantised[0]}; no gradient '
            f"passes through them, so method '{method}' would train on wrong gradients. Adapt the model before "
            "quantisation, or train only the head with method 'frozen'"
        )
