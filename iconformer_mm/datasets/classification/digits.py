"""The handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from iconformer_mm.extras import require_extra


@DATASETS.register_module()
class Digits(BaseDataset):
    """Handwritten digits of the UCI Optical Recognition data set, as shipped with scikit-learn.

    There are 1,797 grey images of 8 x 8 pixels. No download is needed. The split
    is fixed and stratified: 900 images are for testing. Of the other 897, the
    first ``num_per_class`` of each class are for training and the rest for
    choosing hyper-parameters.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``. Defaults to ``'train'``.
        num_per_class: Training images per class, at most 87. Defaults to None:
            all 897, which leaves none for ``'val'``.
        **kwargs: Arguments of ``mmpretrain.BaseDataset``.

    Raises:
        ValueError: ``split`` is unknown, ``'val'`` lacks ``num_per_class``, or a class has
            fewer images.
    """

    METAINFO = {'classes': tuple(str(digit) for digit in range(10))}
    num_test = 900

    def __init__(self, split: str = 'train', num_per_class: int | None = None, **kwargs: Any) -> None:
        if split not in ('train', 'val', 'test'):
            raise ValueError(f"split must be 'train', 'val' or 'test', got {split!r}")
        if split == 'val' and num_per_class is None:
            raise ValueError("split='val' needs num_per_class, the number of training images per class to leave out")
        self.split = split
        self.num_per_class = num_per_class
        super().__init__(ann_file='', **kwargs)

    def load_data_list(self) -> list[dict]:
        """Take the images of the split out of scikit-learn."""
        require_extra('quickstart', 'the data set Digits')
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(
            np.arange(len(digits.target)), test_size=self.num_test, random_state=0, stratify=digits.target
        )
        indices = test
        if self.split != 'test':
            groups = [train[digits.target[train] == label] for label in range(10)]
            fewest = min(len(group) for group in groups)
            if self.num_per_class is not None and not 1 <= self.num_per_class <= fewest:
                raise ValueError(f'num_per_class must be from 1 to {fewest}, got {self.num_per_class}')
            part = slice(self.num_per_class) if self.split == 'train' else slice(self.num_per_class, None)
            indices = np.concatenate([group[part] for group in groups])
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        return [dict(img=images[i], gt_label=int(digits.target[i])) for i in indices]
