# AdaptFormer with the settings of its paper. The backbone is frozen.
custom_hooks = [dict(type='PEFTHook', method=dict(type='adaptformer', bottleneck=64))]
