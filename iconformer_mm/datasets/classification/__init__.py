from .digits import Digits
from .image_folder_split import ImageFolderSplit
from .strokes import Strokes
from .svhn import SVHN

__all__ = ['SVHN', 'Digits', 'ImageFolderSplit', 'Strokes']
