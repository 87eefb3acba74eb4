# Mona (Yin et al., CVPR 2025): adapters with depth-wise convolutions after attention and FFN.
custom_hooks = [dict(type='PEFTHook', method=dict(type='mona', bottleneck=64))]
