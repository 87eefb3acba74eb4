"""Differences between the OpenMMLab distributions that share one set of import names, and between releases of torch."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

import torch
from mmengine.config.utils import MODULE2PACKAGE

# The function that makes shapes of an operator known to torch.compile; the name before torch 2.4.
register_fake = getattr(torch.library, 'register_fake', None) or torch.library.impl_abstract


def map_config_packages() -> None:
    """Let ``_base_ = 'mmseg::...'`` find the installed package, whichever distribution it came with.

    MMEngine looks such a config up by the distribution's name, and takes a
    library for missing (or installs the original over it) when another
    distribution provides it.
    """
    MODULE2PACKAGE['iconformer_mm'] = 'iconformer_mm'
    for module, distribution in list(MODULE2PACKAGE.items()):
        if module != distribution and find_spec(module) is not None:
            try:
                metadata.distribution(distribution)
            except metadata.PackageNotFoundError:
                MODULE2PACKAGE[module] = module


def is_autocast_enabled(device: str) -> bool:
    """Whether autocast is on for a device type; torch before 2.4 asks a function for each."""
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:
        return torch.is_autocast_cpu_enabled() if device == 'cpu' else torch.is_autocast_enabled()
