# AdaptFormer with the settings of its paper, backbone frozen.
custom_hooks = [dict(type='PEFTHook', method=dict(type='adaptformer', bottleneck=64))]
