from .dynamic_conv import dynamic_depthwise_conv2d, dynamic_depthwise_conv_tokens
from .filter_norm import filter_norm

__all__ = ['dynamic_depthwise_conv2d', 'dynamic_depthwise_conv_tokens', 'filter_norm']
