"""What iCoN adapters make of images: their kernels, and the maps these filter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from iconformer_mm.adapters import ICoNAdapter
from iconformer_mm.inference import AdapterInferencer
from iconformer_mm.tuning import get_injection
from iconformer_mm.tuning.injection import find_backbone


@dataclass(frozen=True)
class AdapterLook:
    """What one iCoN adapter did with one image.

    Attributes:
        kernels: Its kernels, (c, K, K); with windows, the mean over them.
        before: The bottleneck before the filter, (H, W, c), prefix tokens left out.
        after: The same behind the filter.
    """

    kernels: np.ndarray
    before: np.ndarray
    after: np.ndarray


def icon_adapters(model: nn.Module) -> dict[str, ICoNAdapter]:
    """The iCoN adapters of a model by their names in the backbone, in order.

    Raises:
        ValueError: There is none.
    """
    found = {n: m for n, m in find_backbone(model).named_modules() if isinstance(m, ICoNAdapter)}
    if not found:
        injection = get_injection(model)
        method = f"it is adapted by '{injection.method.name}'" if injection else 'it is not adapted'
        raise ValueError(
            f"the model has no iCoN adapters ({method}); those of 'icon' and 'icon-static' can be looked at"
        )
    return found


@contextmanager
def whole_images(model: nn.Module) -> Iterator[None]:
    """Within it MMSegmentation's models take an image in one piece, not by crops or flipped, too."""
    given = getattr(model, 'test_cfg', None)
    if given is not None and given.get('mode', 'whole') != 'whole':
        model.test_cfg = type(given)({**given, 'mode': 'whole'})
    try:
        yield
    finally:
        if given is not None:
            model.test_cfg = given


def look_at_adapters(inferencer: AdapterInferencer, image: Any) -> dict[str, AdapterLook]:
    """Predict on an image, and see what the iCoN adapters do meanwhile.

    Args:
        inferencer: The model with its active adapter; it is not changed.
        image: Path, or image (H, W, 3), uint8, BGR.

    Returns:
        What each adapter did, by its name in the backbone.

    Raises:
        ValueError: The model has no iCoN adapters, or the image cannot be read.
    """
    kernels: dict[str, np.ndarray] = {}
    before: dict[str, np.ndarray] = {}
    after: dict[str, np.ndarray] = {}
    handles = []
    for name, adapter in icon_adapters(inferencer.model).items():

        def see_kernels(icon: nn.Module, args: tuple, made: Tensor, name: str = name) -> None:
            before[name] = _numpy(args[0][0])
            kernels[name] = _numpy(made).mean(axis=0)

        def see_filtered(activation: nn.Module, args: tuple, name: str = name) -> None:
            height, width, channels = before[name].shape
            after[name] = _numpy(args[0][0, -height * width :]).reshape(height, width, channels)  # prefix tokens first

        handles.append(adapter.icon.register_forward_hook(see_kernels))
        handles.append(adapter.activation.register_forward_pre_hook(see_filtered))
    try:
        with whole_images(inferencer.model):
            inferencer([image])
    finally:
        for handle in handles:
            handle.remove()
    return {name: AdapterLook(kernels[name], before[name], after[name]) for name in kernels}


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def share_between_images(kernels: np.ndarray) -> float:
    """The share of the kernels' variance that lies between images; the rest lies between channels.

    ``sum (k - k_c)^2 / sum (k - k_0)^2``, where ``k_c`` is the mean kernel of a channel over the images and ``k_0``
    the mean over channels, too (an analysis of variance per tap; ours). 0 for static kernels.

    Args:
        kernels: Kernels of images, (N, c, K, K).
    """
    changes = kernels - kernels[:1]  # exactly 0 for static kernels, whose mean is rounded
    total = np.square(kernels - kernels.mean(axis=(0, 1))).sum()
    between = np.square(changes - changes.mean(axis=0)).sum()
    return float(between / total) if total > 0 else 0.0


def stack_layers(kernels: dict[str, np.ndarray]) -> np.ndarray:
    """Kernels of all layers as one vector an image, each layer in units of its kernels' mean norm.

    Args:
        kernels: Kernels of images by layer, (N, c, K, K) each.

    Returns:
        (N, sum of c * K * K).
    """
    return np.concatenate([in_units_of_norm(layer) for layer in kernels.values()], axis=1)


def in_units_of_norm(kernels: np.ndarray) -> np.ndarray:
    """Kernels (N, c, K, K) as vectors (N, c * K * K) whose mean norm is 1."""
    vectors = kernels.reshape(len(kernels), -1)
    norm = np.linalg.norm(vectors, axis=1).mean()
    return vectors / norm if norm > 0 else vectors
