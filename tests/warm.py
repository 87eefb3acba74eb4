"""What the process imports that tools are copied from, see ``commands.py``."""

import contextlib

import torch

import iconformer_mm.cli.main  # noqa: F401

for library in ('mmpretrain', 'mmdet', 'mmseg'):
    with contextlib.suppress(ImportError):
        __import__(f'{library}.models')
        __import__(f'{library}.datasets')
torch.set_num_threads(1)
