"""Predictions on image files, which are drawn and described one file at a time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from iconformer_mm.checkpoint.reading import guard_loading
from iconformer_mm.messages import one_line

from .inferencer import AdapterInferencer
from .predictions import SCORE_THRESHOLD, check_finite, describe_prediction, draw_prediction, write_maps

UNREADABLE = 'is no image that can be read'


def read_image(path: Path) -> np.ndarray | None:
    """Read an image (H, W, 3), BGR. Return None if it cannot be read."""
    try:
        return cv2.imread(str(path))
    except cv2.error:  # more pixels than OpenCV takes
        return None


class FilePredictor:
    """Predicts on image files, and writes pictures and maps of the predictions.

    Args:
        config: See :class:`~iconformer_mm.inference.AdapterInferencer`.
        adapter: An adapter file, or None.
        base: Checkpoint with the base weights, or None.
        device: Device to run on. Defaults to None: the best one available.
        trust: Whether to unpickle the base. Defaults to False.
        score_threshold: Instances of a smaller score are left out. Defaults to 0.3.
    """

    def __init__(
        self,
        config: str,
        adapter: str | None,
        base: str | None,
        device: str | None = None,
        trust: bool = False,
        score_threshold: float = SCORE_THRESHOLD,
    ) -> None:
        guard_loading(trust, 'add --trust-checkpoints')
        self._score = score_threshold
        self._inferencer = AdapterInferencer(config, adapter, base, device, trust)

    def __call__(self, path: str | os.PathLike, target: str | os.PathLike) -> dict[str, Any]:
        """Predict on a file.

        Args:
            path: The image.
            target: What the names of the written files begin with.

        Returns:
            ``prediction``, the description; or ``skipped``, why there is none.
        """
        image = read_image(Path(path))
        if image is None:
            return dict(skipped=UNREADABLE)
        try:
            (prediction,) = self._inferencer([image])
            prediction = prediction.cpu()
            described = describe_prediction(prediction, self._inferencer.classes, self._score)
            check_finite(described)
            draw_prediction(image[..., ::-1].copy(), prediction, f'{target}.png', self._inferencer.meta, self._score)
            write_maps(prediction, Path(target))
        except Exception as error:  # of any library; the other images are not to suffer from it
            for left in (f'{target}.png', f'{target}_labels.png', f'{target}_depth.npy'):
                Path(left).unlink(missing_ok=True)
            height, width = image.shape[:2]
            reason = f'({height} x {width}) cannot be taken by the model ({type(error).__name__}: {error})'
            return dict(skipped=one_line(reason))
        return dict(prediction=described)
