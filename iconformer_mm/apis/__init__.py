from .inferencer import AdapterInferencer

__all__ = ['AdapterInferencer']
