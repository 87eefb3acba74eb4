"""Necks in MMSegmentation's scope."""

from mmseg.registry import MODELS

from .vit_pyramid import SimpleFPN, ViTPyramid

MODELS.register_module(module=SimpleFPN)
MODELS.register_module(module=ViTPyramid)
