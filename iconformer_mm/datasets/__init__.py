"""Data sets that the mm libraries lack. They are registered with those libraries."""

from iconformer_mm.registry import register_with

register_with('mmpretrain', 'DATASETS', 'iconformer_mm.datasets.classification')
