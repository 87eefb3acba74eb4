"""The handwritten digits that ship with scikit-learn."""

from __future__ import annotations

from typing import Any

from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from iconformer_mm.datasets.few_shot import digits_indices, read_digits


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
        images, labels = read_digits()
        indices = digits_indices(labels, self.split, self.num_per_class)
        return [dict(img=images[i], gt_label=int(labels[i])) for i in indices]
