"""Adapters of the small configs, with numbers as if they had been trained."""

import numpy as np
import torch
from families import stir
from mmengine.registry import MODELS, init_default_scope

from iconformer_mm import inject, save_adapter
from iconformer_mm.engine import load_config

DIGITS = 'configs/quickstart/vit-quickstart_icon_digits.py'
SCENES = {
    'instance': 'configs/scenes/mask-rcnn_swin-scenes_fpn_icon_target.py',
    'semantic': 'configs/scenes/upernet_swin-scenes_icon_target.py',
    'depth': 'configs/scenes/depth_swin-scenes_icon_target.py',
}


def trained(root, config, path, seed=0, num_classes=None, stirred=1, **notes):
    """A model with the config's base and something like a trained adapter; and its file."""
    cfg = load_config(str(root / config))
    init_default_scope(cfg.default_scope)
    if num_classes is not None:
        cfg.model.head.num_classes = num_classes
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    model.init_weights()
    inject(model, 'icon', bottleneck=16)
    stir(model, stirred).eval()
    save_adapter(model, path, **notes)
    return model


def digit(seed=0):
    return np.random.default_rng(seed).integers(0, 255, (28, 28), dtype=np.uint8)
