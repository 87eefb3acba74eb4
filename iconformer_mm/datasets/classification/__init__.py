from .digits import Digits
from .strokes import Strokes
from .svhn import SVHN

__all__ = ['SVHN', 'Digits', 'Strokes']
