"""Data sets that the mm libraries lack, registered there."""

from iconformer_mm.registry import register_with

register_with('mmpretrain', 'DATASETS', 'iconformer_mm.datasets.classification')
