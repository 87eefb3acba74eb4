from .tuning import inject, remove, summarize
from .version import __version__

__all__ = ['__version__', 'inject', 'remove', 'summarize']
