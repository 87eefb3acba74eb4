"""Statistics of iCoN's kernels: how they differ between images."""

from __future__ import annotations

from typing import Any

import numpy as np

from iconformer_mm.extras import require_extra

from .kernel_probe import in_units_of_norm, share_between_images, stack_layers


def compare_images(kernels: dict[str, np.ndarray]) -> dict[str, Any]:
    """How the kernels (N, c, K, K) of each layer differ between images: distances, principal components and shares.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    require_extra('analysis', 'comparing kernels')
    from sklearn.decomposition import PCA
    from sklearn.metrics import pairwise_distances

    stacked = stack_layers(kernels)
    distances = {name: pairwise_distances(in_units_of_norm(layer)) for name, layer in kernels.items()}
    shares = {name: share_between_images(layer) for name, layer in kernels.items()}
    points, explained = np.zeros((len(stacked), 2)), np.zeros(2)
    if any(shares.values()):
        pca = PCA(min(2, len(stacked)), svd_solver='full').fit(stacked)
        points[:, : pca.n_components_] = pca.transform(stacked)
        explained[: pca.n_components_] = pca.explained_variance_ratio_
    return dict(distances=distances, shares=shares, points=points, explained=explained.tolist())


def describe_layers(kernels: dict[str, np.ndarray], compared: dict[str, Any] | None) -> dict[str, Any]:
    """Return the statistics of each layer as plain data."""
    layers = {}
    for name, layer in kernels.items():
        number, channels, size, _ = layer.shape
        layers[name] = dict(
            channels=channels,
            kernel_size=size,
            mean_norm=float(np.linalg.norm(layer.reshape(number, channels, -1), axis=2).mean()),
            share_between_images=compared and compared['shares'][name],
            mean_distance=compared and float(compared['distances'][name].sum() / (number * (number - 1))),
        )
    return layers
