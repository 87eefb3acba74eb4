from .dynamic_conv import dynamic_depthwise_conv2d

__all__ = ['dynamic_depthwise_conv2d']
