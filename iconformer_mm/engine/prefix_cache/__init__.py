"""The frozen prefix of a backbone computed once for each draw of the training data, and read in every epoch."""

from .caching import PrefixCache
from .options import PrefixCacheOptions

__all__ = ['PrefixCache', 'PrefixCacheOptions']
