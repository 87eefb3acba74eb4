"""Backbones that are born adapted, registered where each library looks for its own."""

from iconformer_mm.registry import register_with

register_with('mmpretrain', 'MODELS', 'iconformer_mm.models.mmpretrain_backbones')
