"""Street View House Numbers, cropped digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mmengine.dist as dist
import numpy as np
from mmpretrain.datasets import BaseDataset
from mmpretrain.datasets.utils import check_md5, download_url
from mmpretrain.registry import DATASETS


@DATASETS.register_module()
class SVHN(BaseDataset):
    """Street View House Numbers (Netzer et al., 2011), format 2: cropped digits.

    It reads the official MATLAB files ``train_32x32.mat`` (73,257 images),
    ``test_32x32.mat`` (26,032) and ``extra_32x32.mat`` (531,131). ``X`` is
    (32, 32, 3, n), uint8, RGB. ``y`` is (n, 1) with labels 1 to 10, where 10
    means the digit 0.

    Args:
        data_root: Folder of the files.
        split: ``'train'``, ``'test'`` or ``'extra'``. Defaults to ``'train'``.
        download: Whether to download a missing file. Its MD5 sum is checked.
            Defaults to False.
        **kwargs: Arguments of ``mmpretrain.BaseDataset``.

    Raises:
        ValueError: ``split`` is unknown.
        FileNotFoundError: The file is missing and ``download`` is off.
        RuntimeError: The file is damaged or not an SVHN file.
    """

    METAINFO = {'classes': tuple(str(digit) for digit in range(10))}
    url = 'http://ufldl.stanford.edu/housenumbers/'
    md5 = {
        'train': 'e26dedcc434d2e4c54c9b2d4a06d8373',
        'test': 'eb5a983be6a315427106f1b164d9cef3',
        'extra': 'a93ce644f1a588dc4d68dda5feec44a7',
    }

    def __init__(self, data_root: str, split: str = 'train', download: bool = False, **kwargs: Any) -> None:
        if split not in self.md5:
            raise ValueError(f'split must be one of {", ".join(self.md5)}, got {split!r}')
        self.split = split
        self.download = download
        kwargs.setdefault('test_mode', split == 'test')
        super().__init__(ann_file='', data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the images and labels of the split."""
        from scipy.io import loadmat

        path = Path(self.data_root) / f'{self.split}_32x32.mat'
        if self.download and dist.is_main_process() and not (path.is_file() and check_md5(path, self.md5[self.split])):
            download_url(self.url + path.name, str(path.parent), filename=path.name, md5=self.md5[self.split])
        dist.barrier()
        if not path.is_file():
            raise FileNotFoundError(
                f'SVHN file {path} is missing; get it from {self.url}{path.name}, or set `download=True` in the '
                'data set config'
            )
        try:
            content = loadmat(path, variable_names=['X', 'y'])
            images, labels = content['X'], content['y'].reshape(-1)
        except Exception as error:  # scipy raises many exceptions for a damaged file
            raise RuntimeError(f'{path} cannot be read as an SVHN file ({error}); download it again') from error
        if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.shape[3] != len(labels):
            raise RuntimeError(
                f'{path} is not an SVHN file of cropped digits: X is {images.shape} with {len(labels)} labels, '
                'expected (32, 32, 3, n) with n labels'
            )
        if not np.isin(labels, np.arange(1, 11)).all():
            raise RuntimeError(f'{path} is not an SVHN file of cropped digits: its labels are not all within 1 to 10')
        images = np.ascontiguousarray(images.transpose(3, 0, 1, 2))
        return [dict(img=image, gt_label=int(label) % 10) for image, label in zip(images, labels)]

    def extra_repr(self) -> list[str]:
        """Return lines for ``print(dataset)``."""
        return [f'Root of dataset: \t{self.data_root}', f'Split: \t{self.split}']
