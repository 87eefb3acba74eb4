"""Necks in MMDetection's scope."""

from mmdet.registry import MODELS

from .vit_pyramid import SimpleFPN, ViTPyramid

MODELS.register_module(module=SimpleFPN)
MODELS.register_module(module=ViTPyramid)
