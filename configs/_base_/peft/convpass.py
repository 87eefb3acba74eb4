# Convpass (Jie and Deng, 2022): convolutional bypasses of attention and FFN.
custom_hooks = [dict(type='PEFTHook', method=dict(type='convpass', bottleneck=8))]
