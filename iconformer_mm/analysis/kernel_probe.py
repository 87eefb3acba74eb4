"""What iCoN adapters compute for images: their kernels, and the maps that the kernels filter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
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
class AdapterTrace:
    """What one iCoN adapter did with one image.

    Attributes:
        kernels: The kernels, (c, K, K). With windows, the mean over the windows.
        before: The bottleneck before the filter, (H, W, c), without prefix tokens.
        after: The bottleneck after the filter, (H, W, c).
    """

    kernels: np.ndarray
    before: np.ndarray
    after: np.ndarray


def icon_adapters(model: nn.Module) -> dict[str, ICoNAdapter]:
    """Return the iCoN adapters of a model by their names in the backbone, in order.

    Raises:
        ValueError: The model has no iCoN adapter.
    """
    found = {n: m for n, m in find_backbone(model).named_modules() if isinstance(m, ICoNAdapter)}
    if not found:
        injection = get_injection(model)
        method = f"it is adapted by '{injection.method.name}'" if injection else 'it is not adapted'
        raise ValueError(
            f"the model has no iCoN adapters ({method}); those of 'icon' and 'icon-static' can be inspected"
        )
    return found


@contextmanager
def whole_images(model: nn.Module) -> Iterator[None]:
    """Make MMSegmentation's models process the whole image once, without crops or flips."""
    given = getattr(model, 'test_cfg', None)
    if given is not None and given.get('mode', 'whole') != 'whole':
        model.test_cfg = type(given)({**given, 'mode': 'whole'})
    try:
        yield
    finally:
        if given is not None:
            model.test_cfg = given


def look_at_adapters(inferencer: AdapterInferencer, image: Any) -> dict[str, AdapterTrace]:
    """Predict on an image, and see what the iCoN adapters do meanwhile.

    Args:
        inferencer: The model with its active adapter. It is not changed.
        image: Path, or image (H, W, 3), uint8, BGR.

    Returns:
        What each adapter computed, by its name in the backbone.

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
    return {name: AdapterTrace(kernels[name], before[name], after[name]) for name in kernels}


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def share_between_images(kernels: np.ndarray) -> float:
    """Return the share of the kernels' variance that lies between images. The rest lies between channels.

    The share is ``sum (k - k_c)^2 / sum (k - k_0)^2``. Here ``k_c`` is the mean kernel of a channel over the images
    and ``k_0`` the mean over images and channels. This is an analysis of variance per tap (ours). It is 0 for static
    kernels.

    Args:
        kernels: Kernels of images, (N, c, K, K).
    """
    changes = kernels - kernels[:1]  # exactly 0 for static kernels; their mean would be rounded
    total = np.square(kernels - kernels.mean(axis=(0, 1))).sum()
    between = np.square(changes - changes.mean(axis=0)).sum()
    return float(between / total) if total > 0 else 0.0


def share_between_groups(kernels: np.ndarray, groups: Sequence[Hashable]) -> float:
    """Return the share of the kernels' variance over images that lies between groups of images.

    It is the adjusted share of an analysis of variance, summed over channels and taps, ``1 - (within / (N - G)) /
    (total / (N - 1))`` (epsilon squared, Kelley, PNAS 1935). Groups that say nothing have 0 on average.

    Args:
        kernels: Kernels of images, (N, c, K, K).
        groups: The group of each image, such as its class.

    Returns:
        The share, at most 1. 0 for static kernels.

    Raises:
        ValueError: The numbers differ, or there are fewer than two groups, or no group of two images.
    """
    number, members = len(kernels), defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    if len(groups) != number:
        raise ValueError(f'there are {number} images and {len(groups)} groups of images')
    if not 2 <= len(members) < number:
        raise ValueError(f'{number} images in {len(members)} groups have no variance between and within groups')
    changes = (kernels - kernels[:1]).reshape(number, -1).astype(np.float64)  # exactly 0 for static kernels
    total = np.square(changes - changes.mean(axis=0)).sum()
    within = sum(np.square(part - part.mean(axis=0)).sum() for part in (changes[m] for m in members.values()))
    return float(1 - (within / (number - len(members))) / (total / (number - 1))) if total > 0 else 0.0


def stack_layers(kernels: dict[str, np.ndarray]) -> np.ndarray:
    """Concatenate the kernels of all layers to one vector per image, each layer in units of its mean norm.

    Args:
        kernels: Kernels of images by layer, (N, c, K, K) each.

    Returns:
        (N, sum of c * K * K).
    """
    return np.concatenate([in_units_of_norm(layer) for layer in kernels.values()], axis=1)


def in_units_of_norm(kernels: np.ndarray) -> np.ndarray:
    """Flatten kernels (N, c, K, K) to vectors (N, c * K * K) and scale their mean norm to 1."""
    vectors = kernels.reshape(len(kernels), -1)
    norm = np.linalg.norm(vectors, axis=1).mean()
    return vectors / norm if norm > 0 else vectors
