"""Blocks that are known and refused, each with its reason."""

from __future__ import annotations

from torch import nn

from .base import class_path

_MMPRETRAIN = 'mmpretrain.models.'

# Import path of a class, with why nothing can be put into it.
REFUSED: dict[str, str] = {
    _MMPRETRAIN + 'backbones.revvit.RevTransformerEncoderLayer': (
        'its backward pass recomputes the blocks by itself, without what is put into them'
    ),
    _MMPRETRAIN + 'multimodal.ofa.ofa_modules.OFAEncoderLayer': (
        'it runs tokens of an image and of text in one sequence, of which no part is an encoder of images'
    ),
}


def why_refused(model: nn.Module) -> dict[str, str]:
    """Of the classes in a model, those that are refused, by import path, with the reason."""
    found = {class_path(cls) for module in model.modules() for cls in type(module).__mro__}
    return {path: reason for path, reason in REFUSED.items() if path in found}
