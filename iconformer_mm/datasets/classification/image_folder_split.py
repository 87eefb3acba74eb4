"""A few images of each class in a user's folder, split where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmpretrain.datasets import BaseDataset
from mmpretrain.registry import DATASETS

from iconformer_mm.datasets.checks import DataError
from iconformer_mm.datasets.few_shot import SPLITS, choose_images, fingerprint_of


@DATASETS.register_module()
class ImageFolderSplit(BaseDataset):
    """Images of a folder with one sub-folder a class, split into training, validation and test images (ours).

    Nothing is copied. The split depends on the names of the files and the seed. If the folder has the splits ``train``
    and ``test``, they are kept.

    Args:
        data_root: The folder.
        split: ``'train'``, ``'val'`` or ``'test'``. Defaults to ``'train'``.
        shots: Training images a class, see :func:`iconformer_mm.datasets.few_shot.choose_images`. Defaults to None.
        val: Validation images a class. Defaults to None.
        most: Test images a class, at most. Defaults to None.
        seed: Of the choice. Defaults to 0.
        fingerprint: What :func:`iconformer_mm.datasets.few_shot.fingerprint_of` gave before. Defaults to None: files
            may have changed.
        **kwargs: Arguments of ``mmpretrain.BaseDataset``.

    Raises:
        ValueError: ``split`` is unknown.
        DataError: The folder cannot be split so, or its images changed.
    """

    def __init__(
        self,
        data_root: str,
        split: str = 'train',
        shots: int | None = None,
        val: int | None = None,
        most: int | None = None,
        seed: int = 0,
        fingerprint: str | None = None,
        **kwargs: Any,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be 'train', 'val' or 'test', got {split!r}")
        chosen = choose_images(Path(data_root), shots, most, seed, val)
        if fingerprint not in (None, fingerprint_of(chosen)):
            raise DataError(f'images in {data_root} were added, removed or changed since the comparison began')
        self.split = split
        self._images = chosen[split]
        metainfo = {'classes': tuple(self._images), **(kwargs.pop('metainfo', None) or {})}
        super().__init__(ann_file='', data_root=data_root, metainfo=metainfo, **kwargs)

    def load_data_list(self) -> list[dict]:
        """List the images of the split with their labels."""
        pairs = enumerate(self._images.values())
        return [dict(img_path=str(path), gt_label=label) for label, paths in pairs for path in paths]
