from .dynamic_conv import dynamic_depthwise_conv2d, dynamic_depthwise_conv_tokens

__all__ = ['dynamic_depthwise_conv2d', 'dynamic_depthwise_conv_tokens']
