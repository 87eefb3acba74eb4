import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement

from iconformer_mm.comparison.single_run import image_of


@pytest.mark.parametrize('size', [(96, 128), (126, 168)])
def test_images_are_drawn_in_the_size_of_their_files(size):
    """Pipelines may enlarge them; predictions come back in the size of the file."""
    inputs = torch.zeros(3, *size, dtype=torch.uint8)
    inputs[0] = 10  # blue, as images are read
    inputs[2, :, size[1] // 2 :] = 200
    image = image_of(dict(inputs=inputs, data_samples=BaseDataElement(metainfo=dict(ori_shape=(96, 128)))))
    assert image.shape == (96, 128, 3) and (image[..., 2] == 10).all()
    assert (image[:, :60, 0] == 0).all() and (image[:, 68:, 0] == 200).all() and image.dtype == np.uint8
